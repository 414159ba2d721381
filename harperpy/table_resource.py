"""TableResource: a table over REST."""

from __future__ import annotations

import re
from hashlib import blake2b
from inspect import getattr_static
from types import GenericAlias
from typing import Any, ClassVar, Self, TypeAlias, cast

import msgspec
import sqlalchemy as sa

from .content import Body
from .context import Context
from .contracts import Contract
from .errors import ClientError, InvalidBody, MethodNotAllowed, NotFound, RegistrationError
from .queries import Query, bounded, read_query, refuse_conditions
from .request import RequestTarget
from .resource import Resource
from .sse import encode_json
from .tables import Table, Tables

Fields: TypeAlias = dict[str, Any]

_OF_ALL = ("GET", "HEAD", "POST", "OPTIONS")
_OF_ONE = ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS")
_CUT = re.compile(r"(limit|offset)(=(?!=)|\()")


class TableResource(Resource):
    """A table over REST, made of a Struct.

        class Notes(TableResource):
            record = Note

    In `resources.py` that is all; a plugin mounts `await Notes.of(scope.database.tables)`, or
    `TableResource.over(table)` of a table that it has.

    | request | answer |
    | --- | --- |
    | `GET /notes?topic=a&stars=gt=3&sort(-stars)&limit(20)` | 200, a list of records |
    | `GET /notes/1` | 200, the record |
    | `POST /notes` | 201, the record, its `Location` |
    | `PUT /notes/1` | 204, it is there now as given |
    | `PATCH /notes/1` | 204, the given fields are changed |
    | `DELETE /notes/1` | 204 |

    A record that does not fit is 400, one that is not there 404, a key that is taken 409. Lists are
    cut at `page` records unless `limit` says otherwise, and a `Link` tells where they go on. Roles
    open it like any mount; each write is audited. A record has an `ETag`, and a write that says
    `If-Match` or `If-None-Match: *` is 412 where that fails. Subclass it for verbs of your own.
    """

    sub_paths = True
    extensions = True
    table: ClassVar[Table[Any]]
    record: ClassVar[type[msgspec.Struct]]
    key: ClassVar[str] = "id"
    """The field that names a record."""
    index: ClassVar[tuple[str, ...]] = ()
    """The fields that lists are often asked by."""
    page: ClassVar[int] = 100
    """How many records a list holds where no `limit` is given."""
    most: ClassVar[int] = 1000
    """The highest `limit`."""

    @classmethod
    async def of(cls, tables: Tables) -> type[Self]:
        """The class on the table of its `record`, which is called as the class is.

        Raises `RegistrationError` as `tables.ensure` does.
        """
        if not hasattr(getattr(cls, "record", None), "__struct_fields__"):
            message = f"{cls.__name__}.record: expected the Struct that its records are"
            raise RegistrationError(message)
        return cls.over(await tables.ensure(cls.__name__, cls.record, key=cls.key, index=cls.index))

    @classmethod
    def over(cls, table: Table[Any]) -> type[Self]:
        """The class on a table that is there."""
        record: Any = table.record
        documented = {
            "get": Contract(response=record | GenericAlias(list, (record,))),
            "post": Contract(body=record, response=record),
            "put": Contract(body=record, response=None),
            "patch": Contract(body=dict[str, Any], response=None),
            "delete": Contract(response=None),
        }
        inherited = {
            verb: contract
            for verb, contract in documented.items()
            if getattr_static(cls, verb) is vars(TableResource)[verb]
        }
        body = {"table": table, "schemas": {**inherited, **cls.schemas}}
        return cast("type[Self]", type(cls.__name__, (cls,), body))

    @classmethod
    async def get(cls, target: RequestTarget, context: Context) -> Any:
        """One record, or those that a query asks for."""
        query = read_query(cls.table, target.search)
        if target.id is None:
            return await cls._list(query, target, context)
        row = await cls._found(cls._key(target, context), context)
        if not query.select:
            context.etag = _version(row)
        return cls._shown(cls.table.read(row), query)

    @classmethod
    async def post(cls, target: RequestTarget, data: Body, context: Context) -> Any:
        """A new record."""
        if target.id is not None:
            raise MethodNotAllowed(context.method, _OF_ONE)
        fields = await _fields(data)
        cls._check_key(fields.get(cls.table.key), context)
        kept = await cls.table.insert(context.transaction(), cls.table.record_of(fields))
        context.created(cls.table.row(kept)[cls.table.key])
        return kept

    @classmethod
    async def put(cls, target: RequestTarget, data: Body, context: Context) -> None:
        """A record as given, whether it was there or not."""
        key = cls._key(target, context)
        record = cls._record(await _fields(data), key)
        await cls._check_version(key, context)
        await cls.table.put(context.transaction(), record)

    @classmethod
    async def patch(cls, target: RequestTarget, data: Body, context: Context) -> None:
        """Some fields of a record; the whole of it has to fit."""
        key = cls._key(target, context)
        fields = await _fields(data)
        await cls._check_version(key, context)
        row = await cls._found(key, context, locked=True)
        before = msgspec.to_builtins(cls.table.read(row))
        await cls.table.update(context.transaction(), cls._record({**before, **fields}, key))

    @classmethod
    async def delete(cls, target: RequestTarget, context: Context) -> None:
        """The end of a record."""
        key = cls._key(target, context)
        await cls._check_version(key, context)
        if not await cls.table.delete(context.transaction(), key):
            raise NotFound

    @classmethod
    async def _check_version(cls, key: Any, context: Context) -> None:
        """The request's own conditions, under the lock that its write needs anyway."""
        if "if-match" in context.headers or "if-none-match" in context.headers:
            row = await cls.table.row_at(context.transaction(), key, locked=True)
            context.check_version(None if row is None else _version(row))

    @classmethod
    async def _list(cls, query: Query, target: RequestTarget, context: Context) -> list[Any]:
        limit = cls.page if query.limit is None else query.limit
        if limit > cls.most:
            message = f"query: limit: expected at most {cls.most}, got {limit}"
            raise ClientError(message, param="limit")
        order = [*query.order, cls.table.sql.c[cls.table.key]]
        asked = sa.select(cls.table.sql).where(*query.where).order_by(*order)
        page = bounded(asked.limit(limit + 1).offset(query.offset))
        rows = await context.transaction().execute(page)
        if len(rows) > limit > 0:
            kept = [part for part in target.search.split("&") if not _CUT.match(part)]
            there = "&".join([*filter(None, kept), f"limit={limit}&offset={query.offset + limit}"])
            there = there.replace(">", "%3E")
            context.response_headers["Link"] = f'<{context.path}?{there}>; rel="next"'
        return [cls._shown(cls.table.read(row), query) for row in rows[:limit]]

    @classmethod
    async def _found(cls, key: Any, context: Context, *, locked: bool = False) -> Fields:
        row = await cls.table.row_at(context.transaction(), key, locked=locked)
        if row is None:
            raise NotFound
        return row

    @classmethod
    def _shown(cls, record: msgspec.Struct, query: Query) -> Any:
        if not query.select:
            return record
        values = {name: getattr(record, cls.table.fields[name].name) for name in query.select}
        return values[query.select[0]] if query.bare else values

    @classmethod
    def _key(cls, target: RequestTarget, context: Context) -> Any:
        """The key in the path. Raises `NotFound` for what cannot be one."""
        if target.id is None:
            raise MethodNotAllowed(context.method, _OF_ALL)
        refuse_conditions(cls.table, target.search)
        try:
            key = cls.table.value(cls.table.key, target.id)
        except (msgspec.ValidationError, InvalidBody) as error:
            raise NotFound from error
        if key is None:
            raise NotFound
        return key

    @classmethod
    def _check_key(cls, key: object, context: Context) -> None:
        """Raises `InvalidBody` for a text that would be another record's at the end of a path."""
        if not isinstance(key, str):
            return
        stands = all(part not in ("", ".", "..") for part in key.split("/"))
        if not stands or (cls.extensions and context.types.of_extension(key)):
            message = f"{cls.table.key}: {key!r} cannot be at the end of a path"
            raise InvalidBody(message, param=cls.table.key)

    @classmethod
    def _record(cls, fields: Fields, key: Any) -> Any:
        """The record of these fields. Raises `InvalidBody` if it has another key than the path."""
        name = cls.table.key
        record = cls.table.record_of({name: key, **fields})
        given = getattr(record, cls.table.fields[name].name)
        if cls.table.kept(name, given) != key:
            message = f"{name}: expected {key!r} as in the path, got {given!r}"
            raise InvalidBody(message, param=name)
        return record


def _version(row: Fields) -> str:
    # Of the row, as a set in a record has another order in each process.
    return blake2b(encode_json(row), digest_size=8).hexdigest()


async def _fields(data: Body) -> Fields:
    fields = await data
    if isinstance(fields, dict) and all(isinstance(name, str) for name in cast("Any", fields)):
        return cast("Fields", fields)
    message = "expected a JSON object of fields"
    raise InvalidBody(message)

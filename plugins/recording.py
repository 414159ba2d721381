"""Recording: `insert`, `upsert`, `update`, `delete` of records, in the request's transaction.

What is written is audited with who wrote it, as all that is written in a transaction. A record that
does not fit undoes the whole operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
import sqlalchemy as sa
from msgspec import Meta

from harperpy import Context, InvalidBody, Scope, Table, Transaction

from .places import DATA, Action, Places
from .searching import OF_A_TABLE, Text

Record = dict[str, Any]

# More would take longer than others wait for their turn to write.
_AT_ONCE = Meta(min_length=1, max_length=10_000)


class Write(msgspec.Struct, forbid_unknown_fields=True):
    """Records, each a map of attributes."""

    synonyms: ClassVar[Mapping[str, str]] = OF_A_TABLE

    table: Text
    records: Annotated[list[Record], _AT_ONCE]
    database: Text = DATA


class Delete(msgspec.Struct, forbid_unknown_fields=True):
    """Records by their keys."""

    synonyms: ClassVar[Mapping[str, str]] = {**OF_A_TABLE, "hash_values": "ids"}

    table: Text
    ids: Annotated[list[Any], _AT_ONCE]
    database: Text = DATA


def add_operations(scope: Scope) -> None:
    """Offer the writes, each to whoever may write what it touches."""
    recording = Recording(scope)
    for name in ("insert", "upsert", "update"):
        scope.operations.add(name, getattr(recording, name), Write, open_to="user")
    scope.operations.add("delete", recording.delete, Delete, open_to="user")


class Recording:
    """The writes."""

    def __init__(self, scope: Scope) -> None:
        self._places = Places(scope.database)

    async def insert(self, request: Write, context: Context) -> dict[str, Any]:
        """Add records; one whose key is taken is skipped."""
        table = self._opened(request, context, "insert")
        tx, made, skipped = context.transaction(), list[Any](), list[Any]()
        for at, fields in enumerate(request.records):
            key = _key(table, fields, at)
            if key is not None and await table.get(tx, key, locked=True) is not None:
                skipped.append(key)
            else:
                made.append(await _insert(table, fields, at, tx))
        return _told("inserted", len(request.records), inserted_hashes=made, skipped_hashes=skipped)

    async def upsert(self, request: Write, context: Context) -> dict[str, Any]:
        """Change the given attributes of the records that are there, and add the others."""
        table = self._opened(request, context, "insert", "update")
        tx, made = context.transaction(), list[Any]()
        for at, fields in enumerate(request.records):
            key = _key(table, fields, at)
            if key is not None and await _update(table, key, fields, at, tx):
                made.append(key)
            else:
                made.append(await _insert(table, fields, at, tx))
        return _told("upserted", len(request.records), upserted_hashes=made)

    async def update(self, request: Write, context: Context) -> dict[str, Any]:
        """Change the given attributes of records; one that is not there is skipped."""
        table = self._opened(request, context, "update")
        tx, changed, skipped = context.transaction(), list[Any](), list[Any]()
        for at, fields in enumerate(request.records):
            if (key := _key(table, fields, at)) is None:
                message = f"records[{at}].{table.key}: expected the key of the record to update"
                raise InvalidBody(message, param=f"records[{at}].{table.key}")
            done = await _update(table, key, fields, at, tx)
            (changed if done else skipped).append(key)
        return _told("updated", len(request.records), update_hashes=changed, skipped_hashes=skipped)

    async def delete(self, request: Delete, context: Context) -> dict[str, Any]:
        """Remove records; one that is not there is skipped."""
        wanted: dict[Action, list[str]] = {"delete": []}
        place = self._places.opened(context.user, request.database, request.table, wanted)
        table = _of_a_plugin(place.table)
        keys = [place.value(table.key, key, f"ids[{at}]") for at, key in enumerate(request.ids)]
        tx, gone, skipped = context.transaction(), list[Any](), list[Any]()
        for key in keys:
            (gone if await table.delete(tx, key) else skipped).append(key)
        records = "record" if len(keys) == 1 else "records"
        message = f"{len(gone)} of {len(keys)} {records} successfully deleted"
        return {"message": message, "deleted_hashes": gone, "skipped_hashes": skipped}

    def _opened(self, request: Write, context: Context, *actions: Action) -> Table[Any]:
        """The table, if the user may write all these attributes; an update only names the key."""
        named = list(dict.fromkeys(name for fields in request.records for name in fields))
        known = request.database == DATA and self._places.find(DATA, request.table)
        key = known.key if known else ""
        wanted: dict[Action, list[str]] = {
            action: [name for name in named if action == "insert" or name != key]
            for action in actions
        }
        place = self._places.opened(context.user, request.database, request.table, wanted)
        return _of_a_plugin(place.table)


async def _insert(table: Table[Any], fields: Record, at: int, tx: Transaction) -> Any:
    """Add a record. Its key."""
    kept = await table.insert(tx, _record(table, fields, at))
    return table.row(kept)[table.key]


async def _update(table: Table[Any], key: Any, fields: Record, at: int, tx: Transaction) -> bool:
    """Change these attributes of a record, which has to fit as a whole; whether it is there."""
    before = await table.get(tx, key, locked=True)
    if before is None:
        return False
    row = table.row(_record(table, {**msgspec.to_builtins(before), **fields}, at))
    changes = {name: row[name] for name in fields if name in row and name != table.key}
    if changes:
        await tx.execute(sa.update(table.sql).where(table.at(key)).values(changes))
    return True


def _record(table: Table[Any], fields: Record, at: int) -> Any:
    try:
        return table.record_of(fields)
    except InvalidBody as error:
        raise _named(error, at) from error


def _key(table: Table[Any], fields: Record, at: int) -> Any:
    """The key that a record gives, as the table keeps it; None if it gives none."""
    if (given := fields.get(table.key)) is None:
        return None
    try:
        kind = table.fields[table.key].type
        return table.kept(table.key, msgspec.convert(given, kind))
    except msgspec.ValidationError as error:
        raise _named(InvalidBody(f"{table.key}: {error}", param=table.key), at) from error


def _named(error: InvalidBody, at: int) -> InvalidBody:
    where = f"records[{at}]"
    param = f"{where}.{error.param}" if error.param else where
    return InvalidBody(f"{where}: {error}", param=param)


def _of_a_plugin(table: Table[Any] | None) -> Table[Any]:
    assert table is not None  # noqa: S101  # `system` is never opened for a write
    return table


def _told(done: str, count: int, **hashes: list[Any]) -> dict[str, Any]:
    whole = len(next(iter(hashes.values())))
    return {"message": f"{done} {whole} of {count} records", **hashes}

"""Contracts: what a verb takes and answers, as types that are read once, at registration.

One rule for each part. The body is what the parameter `data` is annotated with, the query what
`RequestTarget[...]` holds, the response what the verb says it returns; `schemas` says what
annotations do not. Where nothing, `Any` or `object` stands, the verb gets what came, undecoded.
`data: Body` reads for itself, so that a body in `schemas` only documents it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, TypeAlias, cast

import msgspec
from msgspec import UNSET

from .backend import settled
from .content import Body, EventStream, refused
from .context import Context
from .errors import InvalidBody, RegistrationError
from .pointers import exact
from .request import RequestTarget
from .signatures import Signature
from .sse import encode_json

Handler: TypeAlias = Callable[[RequestTarget, Any, Context], Any]

_FORM = "application/x-www-form-urlencoded"
_LARGE = 100_000
_PLAIN = (
    msgspec.inspect.StrType,
    msgspec.inspect.IntType,
    msgspec.inspect.FloatType,
    msgspec.inspect.BoolType,
    msgspec.inspect.BytesType,
    msgspec.inspect.NoneType,
    msgspec.inspect.AnyType,
    msgspec.inspect.DateTimeType,
    msgspec.inspect.DateType,
    msgspec.inspect.TimeType,
    msgspec.inspect.TimeDeltaType,
    msgspec.inspect.UUIDType,
    msgspec.inspect.DecimalType,
    msgspec.inspect.EnumType,
    msgspec.inspect.LiteralType,
)
_LISTS = (
    msgspec.inspect.ListType,
    msgspec.inspect.SetType,
    msgspec.inspect.FrozenSetType,
    msgspec.inspect.VarTupleType,
)


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """What one verb takes and answers: types that msgspec knows; UNSET is unsaid.

    `body` is decoded and checked before the verb runs, `query` (a Struct) too, as `target.query`.
    `response` documents; None is an answer without a body, `EventStream` one of events.
    """

    body: Any = UNSET
    query: Any = UNSET
    response: Any = UNSET


class FieldError(msgspec.Struct):
    """What does not fit, and the JSON pointer of where it stands."""

    path: str
    message: str


class Problem(msgspec.Struct, kw_only=True):
    """A refusal: RFC 9457 problem details. `errors` lists what of the request does not fit."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    code: str | msgspec.UnsetType = UNSET
    errors: list[FieldError] | msgspec.UnsetType = UNSET


def contract_of(resource: type[Any], verb: str, *, takes_body: bool) -> tuple[Contract, bool]:
    """A verb's contract, and whether its body is decoded before it runs.

    Raises `RegistrationError` that names class, verb and type.
    """
    where = f"{resource.__name__}.{verb}"
    said = resource.schemas.get(verb, Contract())
    hints = Signature(getattr(resource, verb), resource, where)
    if said.body is not UNSET and not takes_body:
        message = f"{where}: a {verb} has no body, so its contract cannot name one"
        raise RegistrationError(message)
    own = hints.body() if takes_body else UNSET
    reads_itself = own is Body
    contract = Contract(
        body=_agreed(where, "body", UNSET if reads_itself else own, said.body),
        query=_agreed(where, "query", hints.query(), said.query),
        response=hints.response() if said.response is UNSET else said.response,
    )
    _check(where, contract)
    return contract, contract.body is not UNSET and not reads_itself


def check_schemas(resource: type[Any], verbs: Collection[str]) -> None:
    """Refuse `schemas` that are no contracts, or are of verbs that the class does not define."""
    schemas: Any = resource.schemas
    said = cast("Mapping[str, object]", schemas) if isinstance(schemas, Mapping) else None
    if said is None or not all(isinstance(one, Contract) for one in said.values()):
        message = f"{resource.__name__}.schemas: expected a map of verbs to Contract(...)"
        raise RegistrationError(message)
    for verb in said:
        if verb not in verbs:
            message = (
                f"{resource.__name__}.schemas: {verb!r} is no verb that the class defines; "
                f"expected one of {', '.join(verbs)}"
            )
            raise RegistrationError(message)


def typed(handler: Handler, contract: Contract, *, decodes: bool) -> Handler:
    """The handler behind its contract; the same one if nothing is to be decoded."""
    if contract.query is UNSET and not decodes:
        return handler
    query = None if contract.query is UNSET else _query_reader(contract.query)
    body = _body_reader(contract.body) if decodes else None

    async def handle(target: RequestTarget, data: Body, context: Context) -> Any:
        if query is not None:
            target.query = query(target)
        value = await body(data) if body is not None else data
        return await settled(handler(target, value, context))

    return handle


def _agreed(where: str, part: str, annotated: Any, said: Any) -> Any:
    if annotated is UNSET or said is UNSET:
        return said if annotated is UNSET else annotated
    if annotated != said:
        message = (
            f"{where}: its annotations say the {part} is {_shown(annotated)}, "
            f"'schemas' says {_shown(said)}; say it once"
        )
        raise RegistrationError(message)
    return said


def _check(where: str, contract: Contract) -> None:
    for part, kind in msgspec.structs.asdict(contract).items():
        if kind is UNSET or (part == "response" and kind in (None, EventStream)):
            continue
        try:
            msgspec.json.schema_components((kind,))
        except TypeError as error:
            reason = str(error).rpartition("\n")[2]
            message = (
                f"{where}: {_shown(kind)} cannot be its {part}: {reason}; "
                "expected a msgspec Struct, or types that msgspec knows"
            )
            raise RegistrationError(message) from error
    if contract.query is not UNSET:
        _check_query(where, contract.query)


def _check_query(where: str, kind: Any) -> None:
    info = msgspec.inspect.type_info(kind)
    if not isinstance(info, msgspec.inspect.StructType) or info.array_like:
        message = f"{where}: {_shown(kind)} cannot be its query: expected a msgspec Struct"
        raise RegistrationError(message)
    for field in info.fields:
        for one in _members(field.type):
            inner = one.item_type if isinstance(one, _LISTS) else one
            if not all(isinstance(item, _PLAIN) for item in _members(inner)):
                message = (
                    f"{where}: {field.encode_name!r} of {_shown(kind)} cannot stand in a query: "
                    "expected text, numbers, flags, dates, choices, or lists of them"
                )
                raise RegistrationError(message)


def _members(info: msgspec.inspect.Type) -> tuple[msgspec.inspect.Type, ...]:
    """The type itself, or what a union is made of, their metadata taken off."""
    if isinstance(info, msgspec.inspect.Metadata):
        return _members(info.type)
    return info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)


def _shown(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _body_reader(kind: Any) -> Callable[[Body], Awaitable[Any]]:
    """What decodes a body. An empty one is None where None fits."""
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
    try:
        optional = decoder.decode(b"null") is None
    except msgspec.ValidationError:
        optional = False

    async def read(data: Body) -> Any:
        if optional and not await data.bytes():
            return None
        if not data.is_json:
            return _converted(await data, kind, data.content_type)
        try:
            return await data.decode(decoder)
        except InvalidBody as error:
            raise _located(error, await data.bytes(), decoder) from error

    return read


def _converted(value: Any, kind: Any, content_type: str) -> Any:
    """A body of another type: of a form, whose values are text, numbers and flags are read."""
    if not isinstance(value, dict | list):
        message = f"Content-Type: expected application/json, got {content_type}"
        raise InvalidBody(message)
    try:
        return msgspec.convert(value, kind, strict=content_type != _FORM)
    except msgspec.ValidationError as error:
        raise refused(error) from error


def _located(error: InvalidBody, data: bytes, decoder: msgspec.json.Decoder[Any]) -> InvalidBody:
    """The refusal, its pointer saying which keys are meant."""
    path = error.param or ""
    # Beyond that size the search would cost too much for what it tells.
    if "[...]" not in path or len(data) > _LARGE or not error.errors:
        return error
    try:
        document = msgspec.json.decode(data)
        where = exact(path, document, lambda one: _complaint(one, decoder))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        # The decoder stopped before what is worse.
        return error
    errors = [{**error.errors[0], "path": where}]
    return InvalidBody(str(error), param=path, errors=errors)


def _complaint(document: Any, decoder: msgspec.json.Decoder[Any]) -> str:
    try:
        decoder.decode(encode_json(document))
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def _query_reader(kind: Any) -> Callable[[RequestTarget], Any]:
    """What decodes a query: text where numbers and flags are meant, and names given repeatedly."""
    info = msgspec.inspect.type_info(kind)
    fields = info.fields if isinstance(info, msgspec.inspect.StructType) else ()
    lists = {
        field.encode_name
        for field in fields
        if any(isinstance(one, _LISTS) for one in _members(field.type))
    }
    known = {field.encode_name for field in fields}

    def read(target: RequestTarget) -> Any:
        values: dict[str, Any] = {}
        for name, value in target.pairs:
            if name in lists:
                values.setdefault(name, []).append(value)
            elif name in values and name in known:
                told = "Expected one value, got several"
                errors = [{"path": f"/{name}", "message": told}]
                message = f"{name}: {told}"
                raise InvalidBody(message, param=name, errors=errors)
            else:
                values[name] = value
        try:
            return msgspec.convert(values, kind, strict=False)
        except msgspec.ValidationError as error:
            raise refused(error, kind) from error

    return read

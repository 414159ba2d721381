"""The OpenAPI 3.1 document of a set of mounts, from their contracts and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from itertools import chain, count
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin

import msgspec
from msgspec import UNSET

from harperpy import METHOD_VERBS, Contract, Entry, EventStream, Resource

_SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, or an operation token.",
    },
    "basic": {"type": "http", "scheme": "basic", "description": "A user's name and password."},
}
_PARAMETER = re.compile(r"^(?::(\w+)|\*(\w*))$")
_NAME = re.compile(r"\{\w+\}")
_DECIMAL = {"type": "string", "format": "decimal"}
_NUMBER = r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
DESCRIBED = {method: verb for method, verb in METHOD_VERBS.items() if method != "HEAD"}
"""The methods to describe; HEAD goes without saying."""
_MORE = "x-oai-additionalOperations"
"""Where OpenAPI's registry of extensions puts QUERY, as 3.1 itself has no place for it."""

Shown = tuple[Entry, tuple[str, ...]]


def document(shown: Iterable[Shown], *, title: str, version: str) -> dict[str, Any]:
    """The document of these entries, each with the methods to describe."""
    shown = list(shown)
    schemas = _Schemas(shown)
    paths: dict[str, dict[str, Any]] = {}
    shapes: set[str] = set()
    names: set[str] = set()
    for entry, methods in shown:
        for path, parameters in _places(entry):
            # Of two that match the same requests the first answers; OpenAPI takes one only.
            if (shape := _NAME.sub("{}", path)) in shapes:
                continue
            shapes.add(shape)
            told = {
                method: {
                    "operationId": _own_name(f"{method.lower()}{path}", names),
                    **_operation(entry, method, schemas),
                }
                for method in methods
            }
            more = {method: told.pop(method) for method in methods if method == "QUERY"}
            paths[path] = {method.lower(): operation for method, operation in told.items()}
            if more:
                paths[path][_MORE] = more
            if parameters:
                paths[path]["parameters"] = parameters
    tags = [_tag(entry.resource) for entry, _ in shown]
    return {
        "openapi": "3.1.1",
        "info": {"title": title, "version": version},
        "servers": [{"url": "/"}],
        "tags": list({tag["name"]: tag for tag in tags}.values()),
        "paths": paths,
        "components": {"schemas": schemas.components, "securitySchemes": _SCHEMES},
    }


class _Schemas:
    """The JSON Schemas of all types that the document mentions, made at once so as to share."""

    def __init__(self, shown: list[Shown]) -> None:
        kinds = [
            kind
            for entry, methods in shown
            for kind in (
                _error_type(entry.resource),
                *(kind for method in methods for kind in _kinds(_contract(entry, method))),
            )
            if kind is not UNSET
        ]
        try:
            made, self.components = _named(kinds)
        except KeyError:
            # Some are called the same, their module and all, as what a function makes twice.
            kinds = [kind for at, kind in enumerate(kinds) if kind not in kinds[:at]]
            apart = [_named([kind], f"{at}.") for at, kind in enumerate(kinds, 1)]
            made = tuple(one for (one,), _ in apart)
            self.components = {name: one for _, some in apart for name, one in some.items()}
        for each in (*made, *self.components.values()):
            _mend(each)
        self._made = list(zip(kinds, made, strict=True))

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema of one of them, mostly a reference."""
        # Not a mapping: not every type can be hashed.
        return next(schema for known, schema in self._made if known == kind)

    def fields(self, kind: Any) -> Iterator[tuple[str, dict[str, Any], bool]]:
        """A Struct's fields: name, schema, and whether it must be given."""
        schema = self.of(kind)
        if "$ref" in schema:
            schema = self.components[schema["$ref"].rpartition("/")[2]]
        for name, field in schema["properties"].items():
            yield name, field, name in schema.get("required", ())


def _named(kinds: list[Any], prefix: str = "") -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """The schemas of these types, and by name those that they refer to."""
    where = f"#/components/schemas/{prefix}{{name}}"
    made, components = msgspec.json.schema_components(kinds, ref_template=where)
    return made, {f"{prefix}{name}": schema for name, schema in components.items()}


def verbs_of(entry: Entry, method: str) -> tuple[str, ...]:
    """What answers a method: for GET it may be `search`, and `connect` alone or beside it."""
    verb, _ = METHOD_VERBS[method]
    if verb == "get" and verb not in entry.handlers and "search" in entry.handlers:
        verb = "search"
    plain = (verb,) if verb in entry.handlers and "rest" in entry.protocols else ()
    streams = verb in ("get", "search") and "connect" in entry.handlers and "sse" in entry.protocols
    return (*plain, "connect") if streams else plain


def _contract(entry: Entry, method: str) -> Contract:
    return entry.contracts[verbs_of(entry, method)[0]]


def _kinds(contract: Contract) -> Iterator[Any]:
    """The types of a contract that have a schema."""
    yield contract.body
    yield contract.query
    yield from () if contract.response is EventStream else (_value(contract.response),)


def _value(response: Any) -> Any:
    """A response's type without None, for which nothing is sent; UNSET if nothing else is left."""
    if response is None:
        return UNSET
    if get_origin(response) in (Union, UnionType):
        kinds = tuple(kind for kind in get_args(response) if kind is not NoneType)
        return Union[kinds] if kinds else UNSET  # noqa: UP007  # known at run time only
    return response


def _error_type(resource: type[Resource]) -> Any:
    """The type of its refusals; UNSET if it words them in a way that it does not declare."""
    definers = [
        next(level for level in resource.__mro__ if name in vars(level))
        for name in ("present_error", "error_type")
    ]
    return resource.error_type if issubclass(definers[1], definers[0]) else UNSET


def _mend(schema: Any) -> None:
    """Say what harperpy does where msgspec's schema says what msgspec alone would."""
    if isinstance(schema, list):
        for one in cast("list[object]", schema):
            _mend(one)
    elif isinstance(schema, dict):
        fields = cast("dict[str, Any]", schema)
        if fields.items() >= _DECIMAL.items():
            fields |= {"type": ["number", "string"], "pattern": _NUMBER}
        for one in fields.values():
            _mend(one)


def _places(entry: Entry) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The paths of an entry, `:id` as `{id}`, and their parameters."""
    steps: list[str] = []
    names: list[str] = []
    for step in entry.path.split("/"):
        found = _PARAMETER.match(step)
        if found:
            names.append(found[1] or found[2] or "wildcard")
        steps.append(f"{{{names[-1]}}}" if found else step)
    path = "/" + "/".join(steps)
    yield path, [_path_parameter(name) for name in names]
    if entry.resource.sub_paths:
        below = "id" if "id" not in names else "rest"
        yield f"{path.rstrip('/')}/{{{below}}}", [_path_parameter(n) for n in (*names, below)]


def _path_parameter(name: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _tag(resource: type[Resource]) -> dict[str, str]:
    summary, text = _told(resource.__doc__)
    described = "\n\n".join(part for part in (summary, text) if part)
    return {"name": resource.__name__, **({"description": described} if described else {})}


def _told(docstring: str | None) -> tuple[str, str]:
    """A docstring's first sentence, and the rest."""
    summary, _, text = inspect.cleandoc(docstring or "").partition("\n\n")
    return " ".join(summary.split()), text.strip()


def _own_name(text: str, names: set[str]) -> str:
    """What generators of clients call an operation: no other has it, as paths alike may have."""
    plain = re.sub(r"\W+", "_", text).rstrip("_")
    numbered = (f"{plain}_{number}" for number in count(2))
    name = next(one for one in chain([plain], numbered) if one not in names)
    names.add(name)
    return name


def _operation(entry: Entry, method: str, schemas: _Schemas) -> dict[str, Any]:
    permission = METHOD_VERBS[method][1]
    contract = _contract(entry, method)
    summary, text = _told(getattr(entry.resource, verbs_of(entry, method)[0]).__doc__)
    is_open = permission in entry.public
    operation: dict[str, Any] = {
        "tags": [entry.resource.__name__],
        "security": [] if is_open else [{name: []} for name in _SCHEMES],
        "responses": _responses(entry, method, is_open=is_open, schemas=schemas),
    }
    if summary:
        operation["summary"] = summary
    if text:
        operation["description"] = text
    if contract.query is not UNSET:
        operation["parameters"] = [
            {"name": name, "in": "query", "required": required, "schema": schema}
            for name, schema, required in schemas.fields(contract.query)
        ]
    if contract.body is not UNSET:
        content = {"application/json": {"schema": schemas.of(contract.body)}}
        required = NoneType not in get_args(contract.body)
        operation["requestBody"] = {"required": required, "content": content}
    elif method in ("POST", "PUT", "PATCH", "QUERY"):
        operation["requestBody"] = {"content": {"application/json": {"schema": {}}}}
    return operation


def _responses(
    entry: Entry, method: str, *, is_open: bool, schemas: _Schemas
) -> dict[str, dict[str, Any]]:
    contract = _contract(entry, method)
    responses = _good(contract.response, method, schemas)
    if len(verbs_of(entry, method)) > 1:
        good = responses.setdefault("200", {"description": "Done."})
        good.setdefault("content", {})["text/event-stream"] = {}
    kind = _error_type(entry.resource)
    content = {} if kind is UNSET else {"application/json": {"schema": schemas.of(kind)}}
    refusal = {"content": content} if content else {}
    if contract.body is not UNSET or contract.query is not UNSET:
        responses["400"] = {"description": "What was sent does not fit.", **refusal}
    if not is_open:
        responses["401"] = {"description": "No credential was sent, or a wrong one.", **refusal}
        responses["403"] = {"description": "This user may not.", **refusal}
    responses["4XX"] = {"description": "Refused.", **refusal}
    responses["5XX"] = {"description": "Failed.", **refusal}
    return responses


def _good(response: Any, method: str, schemas: _Schemas) -> dict[str, dict[str, Any]]:
    if response is UNSET:
        return {"2XX": {"description": "Done."}}
    if response is EventStream:
        content: dict[str, Any] = {"text/event-stream": {}}
        return {"200": {"description": "A stream of events.", "content": content}}
    responses: dict[str, dict[str, Any]] = {}
    value = _value(response)
    if value is not UNSET:
        media = "application/octet-stream" if value is bytes else "application/json"
        content = {media: {} if value is bytes else {"schema": schemas.of(value)}}
        responses["200"] = {"description": "Done.", "content": content}
        if method in ("POST", "PUT"):
            responses["201"] = {"description": "Created.", "content": content}
    if method != "GET" and (response is None or NoneType in get_args(response)):
        responses["204"] = {"description": "Done; there is nothing to say."}
    if not responses:
        responses["404"] = {"description": "Nothing is there."}
    return responses

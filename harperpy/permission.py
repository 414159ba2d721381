"""Permission: what a role may do, what an API key leaves of it, and how its document is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, cast, get_args, get_origin

import msgspec

from .errors import ClientError
from .pointers import told
from .spelling import closest

Verb: TypeAlias = Literal["read", "create", "update", "delete"]
"""What a permission is for: get and query; post; put and patch; delete."""
Action: TypeAlias = Literal["read", "insert", "update", "delete"]
"""What is done to the records of a table."""

DATABASE, SYSTEM = "data", "system"
"""Where plugins' tables are, and the server's own."""
STANDARD_USER, READ_ONLY = "standard_user", "read_only"
"""Groups of operations: those open to every user; of them those that change nothing."""

_ANY = "*"
_PATH_EXPECTED = "expected a mount such as 'v1/models', 'v1/*' for all beneath, or '*'"
_NAME_EXPECTED = "expected a name, or its beginning with '*' at the end"
_VERBS: list[Verb] = ["read", "create", "update", "delete"]


class AttributeRights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be done with one attribute (column) of a table."""

    attribute_name: str
    read: bool = False
    insert: bool = False
    update: bool = False


class TableRights(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What may be done with a table. Where attributes are listed, no others are touched."""

    read: bool = False
    insert: bool = False
    update: bool = False
    delete: bool = False
    attribute_permissions: list[AttributeRights] = []

    def allows(self, action: Action, *attributes: str) -> bool:
        """Whether records may be read, inserted, updated or deleted, with these attributes."""
        if not getattr(self, action):
            return False
        known = self.attributes(action)
        return known is None or known.issuperset(attributes)

    def attributes(self, action: Action) -> frozenset[str] | None:
        """The attributes that the action may touch; None for all."""
        if action == "delete" or not self.attribute_permissions:
            return None
        listed = self.attribute_permissions
        return frozenset(one.attribute_name for one in listed if getattr(one, action))


_NOTHING = TableRights()
_READING = TableRights(read=True)
_EVERYTHING = TableRights(read=True, insert=True, update=True, delete=True)


class Grants(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an API key has of its owner's role.

    `resources` and `models` are the owner's where they are not given; of operations a key with
    grants may run those that it names, and no others.
    """

    resources: dict[str, list[Verb]] | None = None
    models: list[str] | None = None
    operations: list[str] = []

    def errors(self) -> list[str]:
        """What is wrong with its paths, and with its names of models."""
        paths = [path for path in self.resources or () if not _is_path(path)]
        names = [name for name in self.models or () if not _is_name(name)]
        return [
            *(f"resources: {path!r}: {_PATH_EXPECTED}" for path in paths),
            *(f"models: {name!r}: {_NAME_EXPECTED}" for name in names),
        ]


class Permission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a role may do.

    `resources` maps a path (`v1/models`, `v1/*`, `*`) to verbs; `models` are names (`local`) and
    beginnings of names (`gpt-*`), None for all; `operations` are names and groups, None for those
    that are open to every user; `databases` maps database to table to rights. `limited_to` are the
    operations that an API key with grants leaves of these.
    """

    super_user: bool = False
    structure_user: bool | list[str] = False
    resources: dict[str, list[Verb]] = {}
    operations: list[str] | None = None
    models: list[str] | None = None
    databases: dict[str, dict[str, TableRights]] = {}
    limited_to: list[str] | None = None

    def __post_init__(self) -> None:
        if self.super_user and (self.resources or self.operations or self.models):
            message = "permission: a super_user role takes no other permissions"
            raise ValueError(message)

    def allows(self, path: str, verb: Verb) -> bool:
        """Whether this permission opens the resource mounted at `path` for the verb."""
        return self.super_user or any(
            verb in verbs and covers(pattern, path) for pattern, verbs in self.resources.items()
        )

    def uses(self, *names: str | None) -> bool:
        """Whether it has a model that goes by any of these names."""
        listed = None if self.super_user else self.models
        return listed is None or any(_begins(one, name) for one in listed for name in names if name)

    def runs(self, names: Iterable[str]) -> bool:
        """Whether it has an operation, given its name and the groups that it is in."""
        if self.super_user:
            return True
        listed = [STANDARD_USER] if self.operations is None else self.operations
        sides = (listed, *([] if self.limited_to is None else [self.limited_to]))
        return all(_ANY in side or any(name in side for name in names) for side in sides)

    def table(self, database: str, table: str) -> TableRights:
        """What may be done with the records of a table; `system` is only read, by super users."""
        if database == SYSTEM:
            return _READING if self.super_user else _NOTHING
        if self.super_user:
            return _EVERYTHING
        tables = self.databases.get(database) or self.databases.get(_ANY) or {}
        return tables.get(table) or tables.get(_ANY) or _NOTHING

    def narrowed(self, grants: Grants) -> Permission:
        """What a key with these grants has of this: never more, and never a super user's all."""
        own = _EVERY if self.super_user else self
        return Permission(
            structure_user=own.structure_user,
            resources=_common(own.resources, grants.resources),
            operations=own.operations,
            models=_both(own.models, grants.models),
            databases=own.databases,
            limited_to=grants.operations,
        )

    def asked(self, grants: Grants) -> Permission:
        """What a key with these grants asks for, whether there is so much or not."""
        own = _EVERY if self.super_user else self
        return msgspec.structs.replace(
            own,
            resources=own.resources if grants.resources is None else grants.resources,
            models=own.models if grants.models is None else grants.models,
            operations=grants.operations,
        )

    def exceeds(self, other: Permission) -> str | None:
        """Which of these (`resources`, `models`, a database) another has not; operations aside."""
        if other.super_user:
            return None
        if self.super_user:
            return "super_user"
        if self.structure_user and self.structure_user != other.structure_user:
            return "structure_user"
        for pattern, verbs in self.resources.items():
            if any(not _opens(other, pattern, verb) for verb in verbs):
                return "resources"
        if other.models is not None:
            mine = [_ANY] if self.models is None else self.models
            if not all(any(_begins(one, name) for one in other.models) for name in mine):
                return "models"
        return next((where for where in self.databases if not _holds(other, self, where)), None)


_EVERY = Permission(
    structure_user=True,
    resources={_ANY: _VERBS},
    operations=[_ANY],
    databases={_ANY: {_ANY: _EVERYTHING}},
)


def covers(pattern: str, path: str) -> bool:
    """`v1/*` covers `v1` and all beneath it, `*` everything, any other pattern itself."""
    if pattern == "*":
        return True
    if pattern.endswith("/*"):
        return path == pattern[:-2] or path.startswith(pattern[:-1])
    return path == pattern


def _is_path(pattern: str) -> bool:
    """Whether there may be a mount that it covers."""
    *above, last = pattern.removesuffix("/*").split("/")
    if pattern in ("", _ANY):
        return True
    # A mount's own parameters are part of its path: `files/*rest`.
    open_ended = last.startswith("*") and last != "*"
    texts = [*above, last[1:] if open_ended else last]
    return all(text and "*" not in text for text in texts)


def _is_name(pattern: str) -> bool:
    """Whether it is one of a model, or the beginning of one: only its end may be open."""
    return bool(pattern) and "*" not in pattern[:-1] and not {*pattern} & {*"?["}


def _begins(pattern: str, name: str) -> bool:
    """`gpt-*` stands for all that begins so, beginnings included."""
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _opens(other: Permission, pattern: str, verb: Verb) -> bool:
    """Whether another opens all that a pattern covers."""
    return any(
        verb in verbs and _contains(wider, pattern) for wider, verbs in other.resources.items()
    )


def _contains(wider: str, pattern: str) -> bool:
    if not pattern.endswith("/*"):
        return covers(wider, pattern) and (pattern != _ANY or wider == _ANY)
    return wider == _ANY or (wider.endswith("/*") and covers(wider, pattern[:-2]))


def _common(
    own: Mapping[str, list[Verb]], granted: Mapping[str, list[Verb]] | None
) -> dict[str, list[Verb]]:
    """The patterns and verbs of both; of two patterns one contains the other, or they are apart."""
    found: dict[str, list[Verb]] = {}
    for mine, verbs in own.items():
        for theirs, asked in ({mine: verbs} if granted is None else granted).items():
            narrow = mine if _contains(theirs, mine) else theirs
            if narrow is mine or _contains(mine, theirs):
                kept = found.setdefault(narrow, [])
                kept += [verb for verb in verbs if verb in asked and verb not in kept]
    return found


def _both(own: list[str] | None, granted: list[str] | None) -> list[str] | None:
    """The names of both."""
    if own is None or granted is None:
        return granted if own is None else own
    theirs = [name for name in granted if any(_begins(one, name) for one in own)]
    mine = [name for name in own if any(_begins(one, name) for one in granted)]
    return [*dict.fromkeys([*theirs, *mine])]


def _holds(other: Permission, mine: Permission, database: str) -> bool:
    """Whether another may do with a database's tables all that this one may."""
    actions: tuple[Action, ...] = ("read", "insert", "update", "delete")
    named = mine.databases[database]
    # A table that another names is none of those that '*' stands for there.
    apart = other.databases.get(database, {}) if _ANY in named else {}
    for name in {**named, **apart}:
        table, theirs = mine.table(database, name), other.table(database, name)
        for action in actions:
            wanted, had = table.attributes(action), theirs.attributes(action)
            if not getattr(table, action):
                continue
            if not theirs.allows(action) or (
                had is not None and (wanted is None or not wanted <= had)
            ):
                return False
    return True


class PermissionErrors(ClientError):
    """A permission document that cannot be: what is wrong in it, and in which database."""

    def __init__(self, main: list[str], schema: Mapping[str, list[str]]) -> None:
        super().__init__("Errors in the role permissions JSON provided", param="permission")
        self.report = {"main_permissions": main, "schema_permissions": dict(schema)}


_MAIN: dict[str, Any] = {
    "super_user": bool,
    "structure_user": bool | list[str],
    "resources": dict[str, list[Verb]],
    "operations": list[str],
    "models": list[str],
}


class _Tables(msgspec.Struct, forbid_unknown_fields=True):
    tables: dict[str, TableRights]


def read_permission(document: Mapping[str, Any]) -> Permission:
    """The permission that a document describes. Raises `PermissionErrors`, which lists all."""
    main: list[str] = []
    schema: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    databases: dict[str, dict[str, TableRights]] = {}
    for key, value in document.items():
        if key not in _MAIN and isinstance(value, dict):
            databases[key], schema[key] = _database(key, cast("dict[str, Any]", value))
        elif key == "cluster_user":
            # Harper's roles say so.
            main += [] if value is False else ["cluster_user: expected false, there is no cluster"]
        elif key not in _MAIN:
            near = closest(key, _MAIN)
            main.append(f"{key}: no such permission" + (f"; did you mean {near}?" if near else ""))
        else:
            given[key] = _converted(value, _MAIN[key], key, main)
    main += Grants(resources=given.get("resources"), models=given.get("models")).errors()
    others = [key for key, value in {**given, **databases}.items() if value]
    if given.get("super_user") is True and others != ["super_user"]:
        main.append("super_user: a super_user role takes no other permissions")
    schema = {key: errors for key, errors in schema.items() if errors}
    if main or schema:
        raise PermissionErrors(main, schema)
    return Permission(**given, databases=databases)


def stored_permission(document: Mapping[str, Any]) -> Permission:
    """A permission as the database holds it."""
    main = {key: value for key, value in document.items() if key in _MAIN}
    rest = {key: value for key, value in document.items() if key not in _MAIN}
    tables = msgspec.convert(rest, dict[str, _Tables])
    permission = msgspec.convert(main, Permission)
    databases = {key: one.tables for key, one in tables.items()}
    return msgspec.structs.replace(permission, databases=databases)


def document_of(permission: Permission) -> dict[str, Any]:
    """The document of a permission, without what it does not say."""
    plain: dict[str, Any] = msgspec.to_builtins(permission)
    databases = plain.pop("databases")
    shown = {key: plain[key] for key in _MAIN if plain[key] is not None}
    if permission.limited_to is not None:
        shown["operations"] = permission.limited_to
    if not shown["structure_user"]:
        del shown["structure_user"]
    return {**shown, **{key: {"tables": tables} for key, tables in databases.items()}}


def _converted(value: Any, kind: Any, key: str, errors: list[str]) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        errors += [*_misfits(value, kind, key)] or [f"{key}: {error}"]
        return None


def _misfits(value: Any, kind: Any, key: str) -> Iterator[str]:
    """What is wrong with the items of a map, of which msgspec does not say the names."""
    if get_origin(kind) is dict and isinstance(value, dict):
        for name, item in cast("dict[str, Any]", value).items():
            try:
                msgspec.convert(item, get_args(kind)[1])
            except msgspec.ValidationError as error:
                text, path = told(str(error))
                words = f"; expected {', '.join(_VERBS)}" if "enum" in text else ""
                yield f"{key}.{name}{path}: {text}{words}"


def _database(name: str, document: Mapping[str, Any]) -> tuple[dict[str, TableRights], list[str]]:
    """The rights on a database's tables, and what is wrong with them."""
    if name == SYSTEM:
        return {}, ["system is read by super users alone, and written by nobody"]
    if name != DATABASE:
        near = closest(name, [*_MAIN, DATABASE])
        unknown = f"database '{name}' does not exist"
        return {}, [f"{unknown}; did you mean {near}?" if near else unknown]
    errors: list[str] = []
    read = _converted(document, _Tables, name, errors)
    if read is None:
        return {}, errors
    for table, rights in read.tables.items():
        for one in rights.attribute_permissions:
            actions: tuple[Action, ...] = ("read", "insert", "update")
            errors += [
                f"{table}.{one.attribute_name}: {action} is true, but false of the table"
                for action in actions
                if getattr(one, action) and not getattr(rights, action)
            ]
    return read.tables, errors

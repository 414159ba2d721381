"""Operations: name → typed operation, for the operations port and the command line."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from .auth import User
from .backend import positional, settled
from .content import refused
from .context import Context
from .doors import authorise
from .errors import (
    AccessViolation,
    ClientError,
    NotAuthorised,
    NotFound,
    PluginNotStarted,
    RegistrationError,
)
from .permission import READ_ONLY, STANDARD_USER, Permission, Verb
from .request import RequestTarget
from .spelling import closest, nearest

# What the command line calls its own; a plugin's command of such a name could never be reached.
COMMAND_LINE = frozenset(
    "check commands dev init key models run sql user version".split()  # noqa: SIM905
)

_LONGEST_TOLD = 100

# The name, and what Harper's own server puts into a body: nobody says here who asks.
_NOT_PARAMETERS = frozenset({"operation", "hdb_user", "hdb_auth_header", "bypass_auth"})


class NoParameters(msgspec.Struct, forbid_unknown_fields=True):
    """The request of an operation that takes none."""


class Operation(msgspec.Struct, frozen=True):
    """One operation. `open_to` says who may: `super_user`, `user` (anyone logged in), `anyone`.

    One that `reads` changes nothing. `help` is the line that the command line shows of it; None for
    what is no command.
    """

    name: str
    function: Callable[..., Any]
    request_type: type[Any]
    open_to: str
    parameters: int
    help: str | None = None
    reads: bool = False
    owner: str = ""

    def refused(self, user: User) -> AccessViolation:
        """What is said to a user who may not run it."""
        if self.open_to == "super_user":
            what = f"Operation '{self.name}' is restricted to 'super_user' roles"
        else:
            what = f"Operation '{self.name}' is not among those of this role or key"
        return NotAuthorised(user, [what], [])

    async def permits(self, permission: Verb, target: RequestTarget, context: Context) -> bool:
        """Whether the context's user may run it."""
        user = context.user
        return self.open_to == "anyone" or (
            user is not None and user.role.permission.runs(self.names)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """By what a role grants it: its name, and the groups that it is in."""
        if self.open_to == "super_user":
            return (self.name,)
        groups = (STANDARD_USER, READ_ONLY) if self.reads else (STANDARD_USER,)
        return (self.name, *groups)


class _ByName(dict[str, Operation]):
    """What all plugins share."""

    frozen = False


class Operations:
    """The operations of a server; open until it starts, then frozen."""

    def __init__(self) -> None:
        self._operations = _ByName()
        self.owner = ""
        """The plugin whose own is what is added here."""

    def of(self, owner: str) -> Operations:
        """The same, for a plugin: what it adds is its own."""
        same = copy.copy(self)
        same.owner = owner
        return same

    def add(
        self,
        name: str,
        function: Callable[..., Any],
        request_type: type[Any],
        *,
        open_to: str = "super_user",
        help: str | None = None,  # noqa: A002
        reads: bool = False,
    ) -> None:
        """Add `function(request, context)`, sync or async; `request` is a `request_type`.

        One that `reads`, and changes nothing, is in the group `read_only` too. Raises
        `RegistrationError` for a taken name or an unknown `open_to`.
        """
        if self._operations.frozen or name in self._operations:
            message = f"operation {name!r} cannot be added: it exists, or the server has started"
            raise RegistrationError(message)
        if open_to not in ("super_user", "user", "anyone"):
            message = f"operation {name!r}: open_to must be 'super_user', 'user' or 'anyone'"
            raise RegistrationError(message)
        count = positional(function, 2)
        self._operations[name] = Operation(
            name, function, request_type, open_to, count, help, reads, self.owner
        )

    def fail(self, owner: str) -> None:
        """Let every operation of a plugin that did not start say so."""

        def refuse() -> None:
            message = f"plugin {owner} did not start"
            raise PluginNotStarted(message)

        for one in [one for one in self if one.owner == owner]:
            failed = msgspec.structs.replace(one, function=refuse, parameters=0)
            self._operations[one.name] = failed

    def freeze(self) -> None:
        """Take no more operations."""
        self._operations.frozen = True

    def __iter__(self) -> Iterator[Operation]:
        return iter(self._operations.values())

    async def call(self, body: Mapping[str, Any], context: Context) -> Any:
        """Run `{"operation": name, …}` for the context's user.

        A request type's `synonyms` map other names of parameters to those of its fields; one with
        a `rest` has all of them in the field of that name. Raises `AccessViolation`, `NotFound` for
        an unknown name, `InvalidBody` for parameters that do not fit.
        """
        name = body.get("operation")
        operation = self._operations.get(name) if isinstance(name, str) else None
        if (operation is None or operation.open_to != "anyone") and context.user is None:
            raise context.rejection or AccessViolation(None)
        if not isinstance(name, str) or not name:
            message = "Request body must include an 'operation' property."
            raise ClientError(message, param="operation")
        if operation is None:
            raise self._unknown(name)
        context.app = name
        await authorise(operation, "create", RequestTarget(), context)
        parameters = _named(body, operation.request_type)
        try:
            request = msgspec.convert(parameters, operation.request_type)
        except msgspec.ValidationError as error:
            raise refused(error, operation.request_type) from error
        given = (request, context)[: operation.parameters]
        return await settled(operation.function(*given))

    def check_names(self, names: Iterable[str]) -> list[str]:
        """What is wrong with the names of operations and groups in a permission."""
        known = [*self._operations, STANDARD_USER, READ_ONLY]
        wrong = [name for name in names if name not in known]
        return [
            f"operations: no operation '{it}'; {nearest(it, known, 'operations')}" for it in wrong
        ]

    def exceeds(self, one: Permission, other: Permission) -> bool:
        """Whether one permission runs an operation that another does not."""
        return any(one.runs(it.names) and not other.runs(it.names) for it in self)

    def _unknown(self, name: str) -> NotFound:
        near = closest(name, self._operations)
        hint = f"; did you mean '{near}'?" if near else ""
        message = f"Operation '{name[:_LONGEST_TOLD]}' not found{hint}"
        return NotFound(message, status=400, param="operation")


def _named(body: Mapping[str, Any], request_type: type[Any]) -> dict[str, Any]:
    """The parameters by the names of the request's fields."""
    synonyms: Mapping[str, str] = getattr(request_type, "synonyms", {})
    parameters: dict[str, Any] = {}
    for key, value in body.items():
        if key in _NOT_PARAMETERS:
            continue
        name = synonyms.get(key, key)
        if name in parameters:
            message = f"{key}: {name} is given already, by another of its names"
            raise ClientError(message, param=key)
        parameters[name] = value
    rest: str | None = getattr(request_type, "rest", None)
    return {rest: parameters} if rest is not None else parameters


class Commands:
    """A plugin's commands: operations for super users that `harperpy NAME key=value` runs."""

    def __init__(self, operations: Operations, plugin: str) -> None:
        self._operations = operations
        self._plugin = plugin

    def add(
        self,
        name: str,
        function: Callable[..., Any],
        request_type: type[Any] = NoParameters,
        *,
        help: str = "",  # noqa: A002
    ) -> None:
        """Add `function(request, context)`, sync or async; `request` is a `request_type`.

        It runs in the running server, else in one that is opened for it without ports. `help` is
        one line, by default the first of the function's docstring. Raises `RegistrationError`.
        """
        where = f"plugins.{self._plugin}: command {name!r}"
        if name in COMMAND_LINE:
            message = f"{where}: the command line has one of its own by that name"
            raise RegistrationError(message)
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            message = f"{where}: expected small letters, digits and '_', a letter first"
            raise RegistrationError(message)
        if not callable(function):
            message = f"{where}: expected a function, got {type(function).__name__}"
            raise RegistrationError(message)
        text = help or (inspect.getdoc(function) or "").partition("\n")[0]
        self._operations.add(name, function, request_type, help=text)

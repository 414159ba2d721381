"""Resources: path → Resource. The longest match at segment boundaries answers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from .auth import User
from .backend import fitted, required, settled
from .content import EventStream
from .context import Context
from .contracts import Contract, Handler, check_schemas, contract_of, typed
from .errors import AccessViolation, PluginNotStarted, RegistrationError, ResourceConflict
from .incoming import Incoming, Read, reader_of
from .outgoing import awaited
from .patterns import Pattern, decoded_segment, has_parameters
from .permission import Verb
from .request import RequestTarget, target_of
from .resource import (
    METHOD_VERBS,
    PERMISSIONS,
    PROTOCOLS,
    VERBS,
    WITHOUT_BODY,
    ProtocolName,
    Resource,
    granted,
    left_to_roles,
)
from .signatures import Signature, miswritten, not_static
from .spelling import closest
from .table_resource import TableResource

logger = logging.getLogger("harperpy.dispatch")

W = TypeVar("W", bound=str)

_RESERVED = frozenset({"health"})
_TAKES = {
    "get": ("target", "context"),
    "search": ("target", "context"),
    "delete": ("target", "context"),
    "connect": ("target", "incoming", "context"),
}
_ASKED = ("user", "target", "context")
_PLAIN = (dict, list, tuple, set, frozenset, str, int, float, Mapping, msgspec.Struct)


class Entry:
    """A mounted resource: its handlers by verb, bound and cut to what they take, once.

    `contracts` says, verb by verb, what they take and answer; `direct` has the verb and permission
    of each method, where nothing else decides; `read` decodes what a WebSocket's
    client sends.
    """

    __slots__ = (
        *("_by_role", "admits", "allow", "contracts", "direct", "handlers", "owner", "path"),
        *("pattern", "plain", "protocols", "public", "read", "resource", "yields"),
    )

    def __init__(
        self, path: str, resource: type[Resource], owner: str, *, yields: bool = False
    ) -> None:
        self.path = path
        self.yields = yields
        self.resource = resource
        self.owner = owner
        self.pattern = Pattern(path) if has_parameters(path) else None
        self.protocols = _words(resource, "protocols", PROTOCOLS)
        self.public = _public(resource)
        verbs = [verb for verb in VERBS if getattr(resource, verb, None) is not None]
        check_schemas(resource, verbs)
        self.contracts: dict[str, Contract] = {}
        self.handlers: dict[str, Handler] = {}
        for verb in verbs:
            self.contracts[verb], decodes = contract_of(
                resource, verb, takes_body=verb not in WITHOUT_BODY
            )
            self.handlers[verb] = typed(
                _handler(resource, verb), self.contracts[verb], decodes=decodes
            )
        # What can only be answered in a type that is negotiated need not begin without one.
        self.plain = frozenset(verb for verb in self.handlers if _gives_plain(resource, verb))
        self.admits = {
            permission: fitted(_fit(resource, f"allow_{permission}", _ASKED), 3)
            for permission in PERMISSIONS
        }
        self._by_role = left_to_roles(resource)
        self.read: Read | None = None
        if "connect" in self.handlers:
            _finish_connect(self)
        answers = {*self.handlers}
        if not answers.isdisjoint(("search", "connect")):
            answers.add("get")
        answered = [method for method, (verb, _) in METHOD_VERBS.items() if verb in answers]
        self.allow = (*answered, "OPTIONS")
        self.direct = _direct(self)

    @property
    def verbs(self) -> tuple[str, ...]:
        """The verbs it defines."""
        return tuple(self.handlers)

    def refused(self, user: User) -> AccessViolation:
        """What is said to a user who may not call it: what everyone is told."""
        return AccessViolation(user)

    def opens(self, permission: Verb, context: Context) -> bool:
        """Whether it is open without a look at more than a role: if not, `permits` decides."""
        return permission in self.public or (
            permission in self._by_role and granted(context.user, context, permission)
        )

    async def permits(self, permission: Verb, target: RequestTarget, context: Context) -> bool:
        """Whether it is open to the context's user; a hook that fails denies."""
        if permission in self.public:
            return True
        try:
            verdict = self.admits[permission](context.user, target, context)
            if verdict is not True:
                verdict = await settled(verdict)
        except Exception:
            logger.exception("allow_%s of %s failed; denied", permission, self.resource.__name__)
            return False
        return verdict is True

    def takes(self, pathname: str, protocol: ProtocolName) -> bool:
        """Whether it answers this protocol, with this left of the path."""
        return protocol in self.protocols and (self.resource.sub_paths or pathname in ("", "/"))


class Resources:
    """The mounts of one port; open until the server starts, then frozen."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._patterns: dict[str, Entry] = {}
        self._frozen, self._deepest = False, 0
        self.selective = False
        """Whether any mount is hidden for a protocol."""

    def set(
        self,
        path: str,
        resource: type[Resource],
        *,
        owner: str = "",
        force: bool = False,
        yields: bool = False,
    ) -> None:
        """Mount a resource class. `""` is the root, which takes what nothing else does.

        `:name` in the path stands for any one segment, `*name` at its end for all that is left;
        their values are the target's `params`. They answer where no mount without them does. One
        that `yields` gives way to any other that answers there.

        Raises `ResourceConflict` for a taken path (unless `force`), `RegistrationError` for a class
        that cannot be mounted.
        """
        path = path.strip("/")
        if self._frozen:
            message = f"{path!r} cannot be mounted: the server has started"
            raise RegistrationError(message)
        if path in _RESERVED:
            message = f"{path!r} cannot be mounted: the server itself answers there"
            raise RegistrationError(message)
        if {*path} & {*"%?#{}"}:
            told = "write it decoded, without any of %?#{}; ':name' is any one segment"
            message = f"{path!r} cannot be mounted: {told}"
            raise RegistrationError(message)
        _check(resource)
        entry = Entry(path, resource, owner, yields=yields)
        place, key = self._place(entry)
        known = place.get(key)
        if known and yields:
            return
        taken = known is not None and known.resource is not resource and not known.yields
        if known and taken and not force:
            message = (
                f"{path!r} is taken by {known.resource.__name__} of plugin {known.owner!r}; "
                f"{resource.__name__} of {owner!r} cannot have it"
            )
            raise ResourceConflict(message)
        place[key] = entry
        self._patterns = dict(sorted(self._patterns.items(), key=_rank))
        self._deepest = max(self._deepest, path.count("/") + 1)
        self.selective = any(entry.protocols != PROTOCOLS for entry in self)

    def fail(self, owner: str) -> None:
        """Let every mount of a plugin that did not start say so."""
        for entry in [entry for entry in self if entry.owner == owner]:
            place, key = self._place(entry)
            place[key] = Entry(entry.path, _failed(entry.resource, owner), owner)

    def freeze(self) -> None:
        """Take no more mounts."""
        self._frozen = True

    def __iter__(self) -> Iterator[Entry]:
        return chain(self._entries.values(), self._patterns.values())

    def match(
        self, path: str, search: str = "", protocol: ProtocolName = "rest"
    ) -> tuple[Entry, RequestTarget] | None:
        """The entry for a request path, and what is left of the path below it."""
        path = path.removeprefix("/")
        entry = self._entries.get(path)
        if entry and protocol in entry.protocols:
            return entry, target_of("", search)
        segments = path.split("/")
        # A path may have thousands: no more of them are looked at than a mount has.
        for count in range(min(len(segments), self._deepest), -1, -1):
            if not count and (found := self._match_pattern(segments, search, protocol)):
                return found
            name = "/".join(map(decoded_segment, segments[:count]))
            entry = self._entries.get(name)
            pathname = _below(segments, count)
            if entry and entry.takes(pathname, protocol):
                return entry, target_of(pathname, search)
        return None

    def _match_pattern(
        self, segments: list[str], search: str, protocol: ProtocolName
    ) -> tuple[Entry, RequestTarget] | None:
        for entry in self._patterns.values():
            if entry.pattern and (found := entry.pattern.match(segments)):
                values, count = found
                pathname = _below(segments, count)
                if entry.takes(pathname, protocol):
                    return entry, target_of(pathname, search, values)
        return None

    def _place(self, entry: Entry) -> tuple[dict[str, Entry], str]:
        """Where an entry is kept, and under what: one shape of a pattern is one path."""
        if entry.pattern is None:
            return self._entries, entry.path
        return self._patterns, entry.pattern.shape


def _direct(entry: Entry) -> dict[str, tuple[str, Verb]]:
    """The verb and the permission of a method, where nothing else decides."""
    if entry.protocols != PROTOCOLS:
        return {}
    several = not entry.handlers.keys().isdisjoint(("search", "connect"))
    return {
        method: (verb, permission)
        for method, (verb, permission) in METHOD_VERBS.items()
        if verb in entry.handlers and not (several and verb == "get")
    }


def _below(segments: list[str], count: int) -> str:
    """What is left of a path after so many of its segments."""
    return "/" + "/".join(segments[count:]) if count < len(segments) else ""


def _rank(pattern: tuple[str, Entry]) -> tuple[int, ...]:
    return pattern[1].pattern.rank if pattern[1].pattern else ()


def _check(resource: Any) -> None:
    if not (inspect.isclass(resource) and issubclass(resource, Resource)):
        message = f"{resource!r} is not a Resource class"
        raise RegistrationError(message)
    if issubclass(resource, TableResource) and not hasattr(resource, "table"):
        message = (
            f"{resource.__name__} has no table yet: mount "
            f"await {resource.__name__}.of(scope.database.tables)"
        )
        raise RegistrationError(message)
    if resource.keepalive <= 0:
        message = f"{resource.__name__}.keepalive: expected seconds, more than 0"
        raise RegistrationError(message)
    hooks = [name for name in dir(Resource) if name.startswith(("allow_", "present_"))]
    if wrong := miswritten(resource, VERBS, hooks):
        raise RegistrationError(wrong)
    for name in (*VERBS, *hooks):
        found = inspect.getattr_static(resource, name, None)
        if found is None and name not in hooks:
            continue
        if not callable(getattr(resource, name)):
            message = f"{resource.__name__}.{name}: expected a function, got {found!r}"
            raise RegistrationError(message)
        if wrong := not_static(found, name):
            message = f"{resource.__name__}.{name} {wrong}"
            raise RegistrationError(message)


def _public(resource: type[Resource]) -> frozenset[Verb]:
    """The permissions that need no login."""
    if isinstance(resource.public, bool):
        return PERMISSIONS if resource.public else frozenset()
    return _words(resource, "public", PERMISSIONS)


def _words(resource: type[Resource], name: str, known: frozenset[W]) -> frozenset[W]:
    """An attribute of the class that is a set of such words, and nothing else."""
    given: Any = getattr(resource, name)
    # A word alone is a collection too: of letters.
    listed = isinstance(given, Collection) and not isinstance(given, str)
    words = cast("list[object]", [*given] if listed else [given])
    wrong = [word for word in words if not listed or word not in list(known)]
    if wrong:
        near = closest(str(wrong[0]), known)
        shown = repr(near if listed else {near})
        hint = f"; did you mean {shown}?" if near else ""
        message = (
            f"{resource.__name__}.{name}: expected a set of {', '.join(sorted(known))}, "
            f"got {wrong[0]!r}{hint}"
        )
        raise RegistrationError(message)
    return frozenset(word for word in known if word in words)


def _handler(resource: type[Resource], verb: str) -> Handler:
    """The verb as a function of (target, data, context), whatever it takes."""
    takes = _TAKES.get(verb, ("target", "data", "context"))
    function = _fit(resource, verb, takes)
    cut = fitted(function, len(takes))
    if verb == "connect" and inspect.iscoroutinefunction(function):
        return lambda target, incoming, context: _connected(
            cut, (target, incoming, context), incoming
        )
    if len(takes) == 2:
        return lambda target, _, context: cut(target, context)
    return cut


def _connected(function: Any, given: tuple[Any, ...], incoming: Incoming | None) -> Any:
    """A coroutine's messages: of a WebSocket it runs once that is open, and may have none."""
    return function(*given) if incoming is None else awaited(lambda: function(*given))


def _finish_connect(entry: Entry) -> None:
    """Its answer is events, of whatever type. Raises `RegistrationError` for what is none."""
    if "connect" in entry.plain:
        message = (
            f"{entry.resource.__name__}.connect says that it returns a plain value; "
            "expected messages one by one: a generator, or any other iterator"
        )
        raise RegistrationError(message)
    contract = entry.contracts["connect"]
    where = f"{entry.resource.__name__}.connect"
    told = Signature(entry.resource.connect, entry.resource, where)  # type: ignore[attr-defined]
    entry.read = reader_of(told.incoming(), where)
    entry.contracts["connect"] = msgspec.structs.replace(contract, response=EventStream)


def _fit(resource: type[Resource], name: str, takes: tuple[str, ...]) -> Callable[..., Any]:
    """The function of that name. Raises if it needs more than it is given, by position."""
    function: Callable[..., Any] = getattr(resource, name)
    parameters = inspect.signature(function).parameters.values()
    named = any(one.kind is one.KEYWORD_ONLY and one.default is one.empty for one in parameters)
    if named or required(function) > len(takes):
        asks = f"{resource.__name__}.{name} takes what it is not given"
        message = f"{asks}: it is given ({', '.join(takes)}), by position"
        raise RegistrationError(message)
    return function


def _gives_plain(resource: type[Resource], verb: str) -> bool:
    """Whether a verb says by its return type that it gives plain values only.

    Nothing is an answer that needs no type, except where it is a refusal.
    """
    function = getattr(resource, verb)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return False
    try:
        told = get_type_hints(function).get("return", Any)
    except Exception:  # noqa: BLE001  # names that only a type checker knows
        return False
    kinds = set(get_args(told) if get_origin(told) in (Union, UnionType) else (told,))
    if verb in ("get", "search"):
        kinds.discard(NoneType)
    return bool(kinds) and all(map(_is_plain, kinds))


def _is_plain(kind: Any) -> bool:
    kind = get_origin(kind) or kind
    return inspect.isclass(kind) and issubclass(kind, _PLAIN)


def _failed(resource: type[Resource], owner: str) -> type[Resource]:
    """The same mount, its refusals worded as before, every verb of which says why it is out."""

    def refuse(*_: object) -> Any:
        message = f"plugin {owner} did not start"
        raise PluginNotStarted(message)

    body: dict[str, Any] = {verb: staticmethod(refuse) for verb in VERBS}
    body |= {"schemas": {}, "hidden": True}
    return type(resource.__name__, (resource,), body)

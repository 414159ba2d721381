"""Which backends may serve a call: by name, capability and fallback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import attrgetter, call
from typing import Any, Literal, TypeAlias, cast, get_args

import msgspec

from .accounting import Method, ModelCall, clipped
from .backend import ModelBackend, define_backend
from .errors import (
    CapabilityError,
    ClientError,
    ModelNotFound,
    PluginNotStarted,
    RegistrationError,
)
from .messages import Capability, EmbedOpts, GenerateOpts
from .needs import all_needs, needs_of
from .permission import Permission
from .spelling import nearest

Kind: TypeAlias = Literal["generative", "embedding"]
"""What a model is for."""

DEFAULT = "default"
# What is asked for is the caller's text, and may be as long as a body.
_MOST_KEPT, _LONGEST_KEPT = 1024, 256
_LONGEST_NAME = 1024

# What a backend may say anew at any time.
_told_of = attrgetter("state", "about")
_BASE: dict[Kind, frozenset[Capability]] = {
    "generative": frozenset({"generate", "stream"}),
    "embedding": frozenset({"embed"}),
}


def is_pattern(name: str) -> bool:
    """Whether a name stands for many (`gpt-*`)."""
    return "*" in name or "?" in name or "[" in name


class Registration(msgspec.Struct, frozen=True):
    """A backend under its logical name, the names to try after it, and the plugin that gave it."""

    kind: Kind
    name: str
    backend: ModelBackend
    fallback: tuple[str, ...] = ()
    owner: str | None = None

    @property
    def is_pattern(self) -> bool:
        """Whether the name stands for many (`gpt-*`)."""
        return is_pattern(self.name)


class Candidate(msgspec.Struct, frozen=True):
    """A registration, its backend, and the provider's model name to ask it for."""

    registration: Registration
    backend: ModelBackend
    provider_model: str | None


class Planned(Candidate, frozen=True):
    """A candidate of a call, and what the row of each attempt at it says from the beginning."""

    row: ModelCall


class ModelInfo(msgspec.Struct, frozen=True, cache_hash=True):
    """A name callers may use. `created` is in seconds since 1970 and does not change."""

    id: str
    kind: Kind
    owned_by: str
    created: int
    provider_model: str | None = None
    state: str = "ready"
    about: str | None = None


class Routes:
    """The registered backends of both kinds; open until the server starts, then frozen."""

    def __init__(self, created: int = 0) -> None:
        self._created = created
        self._frozen = False
        self._found: dict[tuple[object, ...], Sequence[Planned]] = {}
        self._able: dict[Method, dict[str | None, Sequence[Planned]]] = {
            method: {} for method in get_args(Method)
        }
        self._by_name: dict[Kind, dict[str, Registration]] = {"generative": {}, "embedding": {}}
        self._backends: list[ModelBackend] = []
        self._served: list[Callable[[], Sequence[str]]] = []
        # What backends that have been opened may still change of what a listing tells.
        self._seen: list[Any] | None = None
        self._listed: list[ModelInfo] = []

    def add(self, registration: Registration, *, replace: bool = False) -> None:
        """Register. Raises `RegistrationError` for a taken name or a backend of the wrong kind."""
        kind, name = registration.kind, registration.name
        if self._frozen:
            message = f"models: {name!r} cannot be registered, the server has started"
            raise RegistrationError(message)
        if kind not in _BASE:
            message = f"models: kind {kind!r} is unknown; expected 'generative' or 'embedding'"
            raise RegistrationError(message)
        given = cast("object", registration.backend)
        if not isinstance(given, ModelBackend):
            told = "expected a ModelBackend; define_backend makes one of a function"
            message = f"models: {kind} {name!r}: {told}, got {type(given).__name__}"
            raise RegistrationError(message)
        if not name or not name.isprintable() or not registration.backend.name:
            message = (
                "models: a backend needs a name, and a logical one to stand under, of one line"
            )
            raise RegistrationError(message)
        if not _BASE[kind] & registration.backend.capabilities():
            able = " or ".join(sorted(_BASE[kind]))
            message = f"models: {kind} backend {name!r} must implement {able}"
            raise RegistrationError(message)
        if name in self._by_name[kind] and not replace:
            message = f"models: {kind} {name!r} is registered already; say replace=True to take it"
            raise RegistrationError(message)
        self._put(registration)

    def _put(self, registration: Registration) -> None:
        self._by_name[registration.kind][registration.name] = registration
        self._backends, self._seen = [one.backend for one in self], None
        self._served = [one.backend.served for one in self if one.is_pattern]

    def strangers(self) -> Iterator[tuple[str, RegistrationError]]:
        """The owner of each backend that falls back to what does not exist, and what to tell it."""
        for one in self:
            for other in one.fallback:
                if one.owner is not None and other not in self._by_name[one.kind]:
                    hint = nearest(other, [*self._by_name[one.kind]], f"{one.kind} models")
                    missing = f"falls back to {other!r}, which does not exist; {hint}"
                    message = f"models: {one.kind} {one.name!r} {missing}"
                    yield one.owner, RegistrationError(message)

    def fail(self, owner: str) -> None:
        """Let every model of a plugin that did not start say so."""
        for one in [one for one in self if one.owner == owner]:
            self._put(_failed(one))

    def freeze(self) -> None:
        """Take no more registrations."""
        self._frozen = True

    def opened(self) -> None:
        """Each backend has settled its model: what was listed before is told anew."""
        self._seen = None

    def __iter__(self) -> Iterator[Registration]:
        for names in self._by_name.values():
            yield from names.values()

    def find(self, kind: Kind, name: str | None) -> Candidate:
        """The backend for a name. Raises `ModelNotFound`, or `ClientError` if none was named."""
        names = self._by_name[kind]
        if name is None:
            if DEFAULT not in names:
                message = f"Missing 'model': expected a name, there is no default {kind} model."
                raise ClientError(message, param="model")
            return _candidate(names[DEFAULT], DEFAULT)
        # It may come from a body that nobody has checked.
        if not isinstance(name, str) or not name:  # pyright: ignore[reportUnnecessaryIsInstance]
            message = f"Invalid 'model': expected a model name, got {name!r}."
            raise ClientError(message, param="model")
        if exact := names.get(name):
            return _candidate(exact, name)
        for registration in names.values():
            if registration.backend.provider_model == name:
                return _candidate(registration, name)
        for registration in names.values():
            if registration.is_pattern and fnmatchcase(name, registration.name):
                return _candidate(registration, name)
        raise _no_model(name)

    def plan(
        self,
        method: Method,
        asked: Any,
        opts: GenerateOpts | EmbedOpts,
        permission: Permission | None = None,
    ) -> Sequence[Planned]:
        """Whom to ask, one after the other. Raises as `candidates`."""
        name = opts.model
        unlimited = permission is None or permission.models is None or permission.super_user
        if unlimited and name.__class__ is str and not opts.requires:
            able = self._able[method].get(name)
            if able is not None:
                return able
        if isinstance(name, str) and len(name) > _LONGEST_NAME:
            # A pattern would take it, and each event of a stream would hold it.
            raise _no_model(name)
        # Once it has started no backend comes or changes any more, so neither does what is found.
        keeps = self._frozen and unlimited and isinstance(name, str) and len(name) <= _LONGEST_KEPT
        kind, requires = _kind_of(method), needs_of(method, asked, opts)
        if not keeps:
            return _planned(self.candidates(kind, name, requires, permission), method, name)
        key = (method, name, *requires)
        found = self._found.get(key)
        if found is None:
            found = _planned(self.candidates(kind, name, requires), method, name)
            self._keep(key, found)
        return found

    def _keep(self, key: tuple[Any, ...], found: Sequence[Planned]) -> None:
        """Keep what was found for a method, a name, and all that is needed."""
        if len(self._found) >= _MOST_KEPT:
            self._found.clear()
            for able in self._able.values():
                able.clear()
        self._found[key] = found
        method, name, *_ = key
        # Where all of them can do everything, it does not matter what is needed.
        everyone = self.candidates(_kind_of(method), name, {})
        if not any(missing(one.backend, all_needs(method)) for one in everyone):
            self._able[method][name] = found

    def candidates(
        self,
        kind: Kind,
        name: str | None,
        requires: Mapping[Capability, str],
        permission: Permission | None = None,
    ) -> Sequence[Candidate]:
        """Those that may serve, in order. Raises as `find`, or `CapabilityError` if none can.

        `requires` says for each capability which field of the request asked for it. Those that the
        permission does not have are left out; the first one then does not exist.
        """
        first = self.find(kind, name)
        if permission is not None and not _may_use(permission, first, name or DEFAULT):
            raise _no_model(name or DEFAULT)
        others = [self._by_name[kind][other] for other in first.registration.fallback]
        # A pattern that others fall back to has no model of its own: it is asked for the same one.
        asked = first.provider_model or name or DEFAULT
        more = [_candidate(other, asked) for other in others]
        if permission is not None:
            more = [one for one in more if _may_use(permission, one)]
        everyone = [first, *more]
        able = [one for one in everyone if not missing(one.backend, requires)]
        if not able:
            lacking = missing(first.backend, requires)[0]
            raise _incapable(first, lacking, requires[lacking])
        first_of = {id(one.backend): one for one in reversed(able)}
        return [one for one in able if first_of[id(one.backend)] is one]

    def listing(self, permission: Permission | None = None) -> list[ModelInfo]:
        """Logical and advertised names, then what patterns stand for; once each, as registered.

        Of a permission only what it has.
        """
        served = map(tuple, map(call, self._served))
        seen: list[Any] = [*map(_told_of, self._backends), *served]
        if seen != self._seen:
            self._seen, self._listed = seen, self._anew()
        if permission is None or permission.super_user or permission.models is None:
            return self._listed.copy()
        return [one for one in self._listed if self._lists(permission, one)]

    def _anew(self) -> list[ModelInfo]:
        """All that is listed, as a backend has said something new."""
        found: dict[str, ModelInfo] = {}
        for registration in self:
            names = [] if registration.is_pattern else [registration.name]
            for name in (*names, *filter(None, [registration.backend.provider_model])):
                found.setdefault(name, self._info(registration, name))
        for registration in self:
            for name in self._stands_for(registration):
                found.setdefault(name, self._info(registration, name))
        return list(found.values())

    def _lists(self, permission: Permission, info: ModelInfo) -> bool:
        return _may_use(permission, self.find(info.kind, info.id), info.id)

    def _stands_for(self, pattern: Registration) -> Iterator[str]:
        """The names its provider serves that a call would find it by, and no other one first."""
        if not pattern.is_pattern:
            return
        for name in pattern.backend.served():
            if (
                fnmatchcase(name, pattern.name)
                and self.find(pattern.kind, name).registration is pattern
            ):
                yield name

    def _info(self, registration: Registration, name: str) -> ModelInfo:
        backend = registration.backend
        return ModelInfo(
            id=name,
            kind=registration.kind,
            owned_by=backend.name,
            created=self._created,
            provider_model=backend.provider_model,
            state=backend.state,
            about=backend.about,
        )


def _kind_of(method: Method) -> Kind:
    return "embedding" if method == "embed" else "generative"


def blank_row(method: Method, name: str | None) -> ModelCall:
    """What is in the row of each such call that asks for this name."""
    return ModelCall(id=0, created=0.0, method=method, model=clipped(name) or DEFAULT)


def _planned(
    candidates: Sequence[Candidate], method: Method, name: str | None
) -> Sequence[Planned]:
    planned = [_plan_of(candidate, method, name) for candidate in candidates]
    # Another candidate is the better retry: only the last one is asked again.
    last = planned[-1]
    return (*planned, *[last] * last.backend.max_retries)


def _plan_of(candidate: Candidate, method: Method, name: str | None) -> Planned:
    registration, backend, model = msgspec.structs.astuple(candidate)
    row = blank_row(method, name)
    row.backend, row.backend_name = backend.name, registration.name
    row.provider_model = clipped(model)
    return Planned(registration, backend, model, row)


def missing(backend: ModelBackend, requires: Iterable[Capability]) -> list[Capability]:
    """The required capabilities that a backend lacks, in the order given."""
    able = backend.capabilities()
    return [capability for capability in requires if capability not in able]


def _failed(registration: Registration) -> Registration:
    """The same name, each call of which says why it is out."""
    message, given = f"plugin {registration.owner} did not start", registration.backend

    def refuse(*_: object) -> Any:
        raise PluginNotStarted(message)

    backend = define_backend(
        given.name,
        embed=refuse,
        generate=refuse,
        generate_stream=refuse,
        features=given.capabilities(),
    )
    backend.provider_model, backend.state = given.provider_model, message
    return msgspec.structs.replace(registration, backend=backend)


def _candidate(registration: Registration, asked: str) -> Candidate:
    provider_model = registration.backend.provider_model
    if provider_model is None and registration.is_pattern:
        provider_model = asked
    return Candidate(registration, registration.backend, provider_model)


def _may_use(permission: Permission, candidate: Candidate, asked: str | None = None) -> bool:
    registration = candidate.registration
    own = None if registration.is_pattern else registration.name
    return permission.uses(asked, own, candidate.provider_model)


def _no_model(name: str) -> ModelNotFound:
    """OpenAI's sentence, which does not tell one that is not there from one that is not yours."""
    shown = name if len(name) <= _LONGEST_KEPT else f"{name[:_LONGEST_KEPT]}…"
    message = f"The model `{shown}` does not exist or you do not have access to it."
    return ModelNotFound(message)


def _incapable(candidate: Candidate, capability: Capability, param: str) -> CapabilityError:
    name, backend = candidate.registration.name, candidate.backend.name
    message = (
        f"Unsupported parameter: {param!r} is not supported with this model: "
        f"{name!r} (backend {backend!r}) does not support {capability}."
    )
    return CapabilityError(message, param=param)

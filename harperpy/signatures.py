"""What a verb's annotations say of its body, its query and its answer."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections import abc
from collections.abc import Callable, Collection
from typing import Any

from msgspec import UNSET

from .content import Blob, Body, EventStream, Response
from .errors import RegistrationError
from .request import RequestTarget
from .spelling import closest
from .sse import SSE

_BODY = re.compile(r"([\w.]+\.)?Body( \| None)?")
_UNSAID = (inspect.Parameter.empty, Any, object)
_UNTYPED = (*_UNSAID, UNSET, Blob, Response, typing.NoReturn, typing.Never)
_MESSAGES = (abc.AsyncIterator, abc.AsyncIterable, abc.AsyncGenerator)
_STREAMS = (
    abc.AsyncIterator,
    abc.AsyncGenerator,
    abc.AsyncIterable,
    abc.Iterator,
    abc.Generator,
    abc.Iterable,
)

_HOOKED = ("allow", "present")
# Permissions are fewer than verbs, and other servers' hooks are called by those.
_ALIKE = {
    **dict.fromkeys(("allow_get", "allow_search", "allow_query", "allow_connect"), "allow_read"),
    **dict.fromkeys(("allow_put", "allow_patch"), "allow_update"),
    "allow_post": "allow_create",
}


class Signature:
    """A verb's annotations.

    Only those that matter are looked up: what is imported for type checkers alone does no harm.
    """

    def __init__(self, function: Callable[..., Any], resource: type[Any], where: str) -> None:
        signature = inspect.signature(function)
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._parameters = [
            parameter.annotation
            for parameter in signature.parameters.values()
            if parameter.kind in positional
        ]
        self._returned = signature.return_annotation
        self._globals = getattr(inspect.unwrap(function), "__globals__", {})
        self._locals = vars(resource)
        self._where = where

    def body(self) -> Any:
        """The type of `data`; `Body` where the verb reads for itself, UNSET if nothing is said."""
        raw = self._parameters[1] if len(self._parameters) > 1 else inspect.Parameter.empty
        try:
            hint = self._found(raw)
        except RegistrationError:
            if isinstance(raw, str) and _BODY.fullmatch(raw):
                return Body
            raise
        if hint is Body or Body in typing.get_args(hint):
            return Body
        return UNSET if hint in _UNSAID else hint

    def query(self) -> Any:
        """The type of the query: `RequestTarget[Search]`."""
        raw = self._parameters[0] if self._parameters else inspect.Parameter.empty
        if isinstance(raw, str) and "[" not in raw:
            return UNSET
        hint = self._found(raw)
        if typing.get_origin(hint) is not RequestTarget:
            return UNSET
        (kind,) = typing.get_args(hint)
        return UNSET if kind in _UNSAID or isinstance(kind, typing.TypeVar) else kind

    def incoming(self) -> Any:
        """The type of the messages of `incoming: AsyncIterator[Note]`; UNSET if nothing is said."""
        raw = self._parameters[1] if len(self._parameters) > 1 else inspect.Parameter.empty
        hint = self._found(raw)
        for one in (hint, *typing.get_args(hint)):
            if typing.get_origin(one) in _MESSAGES:
                kind = typing.get_args(one)[0]
                return UNSET if kind in _UNSAID or isinstance(kind, typing.TypeVar) else kind
        return UNSET

    def response(self) -> Any:
        """The type of what is sent; UNSET if nothing is said, or what cannot be found here."""
        try:
            return _sent(self._evaluated(self._returned))
        except (NameError, AttributeError, SyntaxError, TypeError):
            return UNSET

    def _found(self, raw: Any) -> Any:
        try:
            return self._evaluated(raw)
        except Exception as error:
            message = (
                f"{self._where}: the annotation {raw!r} cannot be found when the server runs "
                f"({error}); define or import it at the top of the file, not for type checkers only"
            )
            raise RegistrationError(message) from error

    def _evaluated(self, raw: Any) -> Any:
        if raw is inspect.Parameter.empty or raw is None:
            return raw
        holder = types.SimpleNamespace(__annotations__={"it": raw})
        names = self._globals, dict(self._locals)
        return typing.get_type_hints(holder, *names, include_extras=True)["it"]


def _sent(hint: Any) -> Any:
    """Of what a verb returns, the type of the value that is serialised."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (abc.Awaitable, abc.Coroutine):
        return _sent(arguments[-1])
    if origin in (typing.Union, types.UnionType):
        return _any_of([_sent(one) for one in arguments])
    if origin in _STREAMS or hint in _STREAMS:
        item = _sent(arguments[0]) if arguments else UNSET
        return (
            EventStream
            if item is SSE
            else UNSET
            if item is UNSET
            else types.GenericAlias(list, (item,))
        )
    if hint in _UNTYPED or isinstance(hint, typing.TypeVar) or _is_class(hint, BaseException):
        return UNSET
    return None if hint is types.NoneType else hint


def _any_of(kinds: list[Any]) -> Any:
    """Of several kinds of answers those that are values; of events only where there are none."""
    values = [kind for kind in kinds if kind is not UNSET and kind is not EventStream]
    if not values:
        return EventStream if EventStream in kinds else UNSET
    return typing.Union[tuple(values)]  # noqa: UP007  # made of what is known at run time only


def _is_class(hint: Any, base: type[Any]) -> bool:
    return isinstance(hint, type) and issubclass(hint, base)


def not_static(found: object, name: str) -> str | None:
    """What keeps an attribute of a class from being called on the class, with the line to write."""
    function = found.__func__ if isinstance(found, staticmethod) else found
    if not inspect.isfunction(function):
        return None
    if function is found:
        return f"must be static: write @staticmethod on the line above 'def {name}'"
    if name.startswith("present_") and inspect.iscoroutinefunction(function):
        return f"is not awaited: write 'def {name}', without async"
    if "self" in function.__code__.co_varnames[: min(1, function.__code__.co_argcount)]:
        return f"is static, and is given no 'self': write 'def {name}(target, ...)'"
    return None


def miswritten(resource: type[Any], verbs: Collection[str], hooks: Collection[str]) -> str | None:
    """What is wrong with a method that is all but a verb or a hook: nobody would ask it."""
    # What a class has inside may well be a type: `class Query(Struct)`.
    for name in dir(resource):
        verb = name.lower()
        if name in hooks or name in verbs or not (verb in verbs or name.startswith(_HOOKED)):
            continue
        if not inspect.isroutine(getattr(resource, name)):
            continue
        if verb in verbs:
            return f"{resource.__name__}.{name} is no verb; did you mean '{verb}'?"
        if near := _ALIKE.get(verb) or closest(name, hooks, 0.85):
            return f"{resource.__name__}.{name} is never asked; did you mean '{near}'?"
    return None

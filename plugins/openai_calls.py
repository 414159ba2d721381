"""The tool calls in a provider's answer: whole, or in pieces put in order."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from harperpy import BackendError, ToolCall, ToolCallDelta, ToolType

_MOST_CALLS = 128
_MOST_ARGUMENTS = 8 << 20


class Function(msgspec.Struct, gc=False):
    """The function that is called; `arguments` should be JSON text."""

    name: str | None = None
    arguments: Any = None


class Custom(msgspec.Struct, gc=False):
    """The custom tool that is called, and its text."""

    name: str | None = None
    input: Any = None


class Called(msgspec.Struct, gc=False):
    """A call or a piece of one, as providers write them."""

    index: Any = None
    id: Any = None
    function: Function | None = None
    custom: Custom | None = None
    extra_content: Any = None

    @property
    def extra(self) -> dict[str, Any] | None:
        """What the provider wants to see again with the call."""
        given = self.extra_content
        return cast("dict[str, Any]", given) if isinstance(given, dict) else None

    @property
    def told(self) -> tuple[ToolType, str | None, str | None]:
        """What kind of tool is called, its name, and what it is given."""
        if self.custom is not None:
            return "custom", self.custom.name, _text(self.custom.input)
        function = self.function or Function()
        return "function", function.name, _text(function.arguments)


def whole_call(call: Called) -> ToolCall:
    """A call that came in one piece."""
    kind, name, arguments = call.told
    return ToolCall(
        id=_text(call.id) or f"call_{secrets.token_hex(12)}",
        type=kind,
        name=name or "",
        arguments=arguments or ("{}" if kind == "function" else ""),
        extra_content=call.extra,
    )


class _Known:
    """A call that has begun. Until its name is there, its pieces are held back."""

    __slots__ = ("extra", "id", "index", "kind", "name", "pieces")

    def __init__(self, index: int | None, given: str | None) -> None:
        self.index = index
        self.id = given
        self.kind: ToolType = "function"
        self.name: str | None = None
        self.extra: dict[str, Any] | None = None
        self.pieces: list[str] = []

    @property
    def is_complete(self) -> bool:
        """Whether its arguments are all there: nothing can follow a JSON object."""
        last = next((piece for piece in reversed(self.pieces) if piece.strip()), "")
        # Pieces are many, and few of them can be the end.
        if not last.rstrip().endswith("}"):
            return False
        try:
            msgspec.json.decode("".join(self.pieces))
        except msgspec.DecodeError:
            return False
        return self.name is not None


class Calls:
    """The calls of one choice of a stream.

    Providers leave out the index, the id or both, repeat id and name on every piece, or use one
    index for two calls: what begins a call is read off all of them.
    """

    __slots__ = ("_known", "_length")

    def __init__(self) -> None:
        self._known: list[_Known] = []
        self._length = 0

    def __bool__(self) -> bool:
        return bool(self._known)

    def read(self, given: Sequence[Called]) -> list[ToolCallDelta]:
        """What the pieces add: each call's id and name once, its arguments as they come."""
        return [delta for call in given if (delta := self._read(call)) is not None]

    def held_back(self, *, whole: bool) -> list[ToolCallDelta]:
        """At the end: what waited for a name that never came.

        If the calls are `whole`, an empty object for each function that was called with nothing.
        """
        told: list[ToolCallDelta] = []
        for at, known in enumerate(self._known):
            if bare := whole and known.kind == "function" and not any(known.pieces):
                known.pieces = ["{}"]
            if known.name is None:
                told.append(self._head(at, known, ""))
            elif bare:
                told.append(ToolCallDelta(index=at, arguments="{}"))
        return told

    def _read(self, call: Called) -> ToolCallDelta | None:
        kind, name, arguments = call.told
        at, known = self._find(call, name, arguments)
        known.kind = kind
        known.pieces.append(arguments or "")
        self._length += len(arguments or "")
        if len(self._known) > _MOST_CALLS or self._length > _MOST_ARGUMENTS:
            message = "the stream holds more tool calls than anyone can use"
            raise BackendError(message)
        known.extra = call.extra or known.extra
        if known.name is not None:
            extra = call.extra
            return ToolCallDelta(index=at, type=kind, arguments=arguments, extra_content=extra)
        return self._head(at, known, name) if name else None

    def _head(self, at: int, known: _Known, name: str) -> ToolCallDelta:
        known.name = name
        return ToolCallDelta(
            index=at,
            id=known.id,
            type=known.kind,
            name=name,
            arguments="".join(known.pieces),
            extra_content=known.extra,
        )

    def _find(self, call: Called, name: str | None, arguments: str | None) -> tuple[int, _Known]:
        """The call that a piece belongs to; a new one where it begins one."""
        index, given = _number(call.index), _text(call.id) or None
        at = self._last(index, given)
        if at is None or self._begins(self._known[at], call, name, arguments):
            at = len(self._known)
            self._known.append(_Known(index, given))
        known = self._known[at]
        known.id = known.id or given
        return at, known

    def _begins(self, known: _Known, call: Called, name: str | None, arguments: str | None) -> bool:
        """Whether a piece that might belong to a call begins the next one."""
        given = _text(call.id) or None
        if given is not None and known.id is not None:
            return given != known.id
        # Gemini's compatible endpoint and what stands before it number all calls 0; others repeat
        # the name on each piece.
        news = bool((arguments or "").strip()) or name != known.name or _number(call.index) is None
        return bool(name) and given is None and news and known.is_complete

    def _last(self, index: int | None, given: str | None) -> int | None:
        """The latest call of that index; of that id; or the latest of all."""
        for at in range(len(self._known) - 1, -1, -1):
            known = self._known[at]
            if (known.index == index) if index is not None else given in (None, known.id):
                return at
        return None


def _text(value: Any) -> str | None:
    """Text as it is; of anything else its JSON."""
    if value is None or isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def _number(value: Any) -> int | None:
    """An index, even where it was written as text or as a decimal number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value if type(value) is int else None

"""Incoming: what a WebSocket's client sends, and what of it is waiting to be taken."""

from __future__ import annotations

import asyncio
import types
import typing
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import msgspec
from msgspec import UNSET

from .content import decode_json
from .errors import ClientError, HarperError, InvalidBody, RegistrationError

Message: TypeAlias = str | bytes
Read: TypeAlias = Callable[[Message], Any]

# What a handler that is behind may leave waiting before its client has to.
_MOST_BYTES = 64 * 1024
# So that many small messages cannot hold much more than they say.
_BYTES_OF_ANY = 128
_CODES = {401: 3000, 403: 3003, 415: 1003}
_NOT_WHAT_IT_SAYS = 1007
_FAILED = 1011
_REASON_BYTES = 123


class Incoming:
    """The messages of a client, once each, until it closes; what was sent before is still read.

    A message that is not of the type that the handler says raises `InvalidBody`; the next one can
    be read after it. `taken` says whether anybody has asked for one, `ended` that no more come.
    """

    def __init__(self, read: Read | None = None) -> None:
        self.taken = False
        self._read = read
        self._messages: deque[Message] = deque()
        self._size = 0
        self.ended = False
        self._arrived = asyncio.Event()
        self._space = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        self.taken = True
        while not self._messages:
            if self.ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        message = self._messages.popleft()
        self._size -= len(message) + _BYTES_OF_ANY
        self._space.set()
        return message if self._read is None else self._read(message)

    @property
    def full(self) -> bool:
        """Whether no more is read before some is taken."""
        return self._size > _MOST_BYTES and not self.ended

    async def room(self) -> None:
        """Return when there is room for another message."""
        while self.full:
            self._space.clear()
            await self._space.wait()

    def put(self, message: Message) -> None:
        """Take a message in; after the end it is dropped."""
        if not self.ended:
            self._messages.append(message)
            self._size += len(message) + _BYTES_OF_ANY
            self._arrived.set()

    def end(self) -> None:
        """Nothing more comes."""
        self.ended = True
        self._arrived.set()
        self._space.set()


class Socket(msgspec.Struct, frozen=True):
    """What goes over a WebSocket once it is open.

    `check` raises what refuses it by now, and is asked every `interval` seconds, as is the client
    whether it is there.
    """

    source: AsyncIterator[Any]
    incoming: Incoming
    check: Callable[[], Awaitable[None]]
    interval: float


def reader_of(kind: Any, where: str) -> Read | None:
    """What decodes a message; None where it is handed on as it comes: as text or bytes.

    Raises `RegistrationError` for a type that no JSON can be.
    """
    if kind is UNSET or _parts(kind) == {str, bytes}:
        return None
    if kind in (str, bytes):
        return lambda message: _as_it_is(message, kind)
    try:
        msgspec.json.schema_components((kind,))
    except TypeError as error:
        message = f"{where}: {kind} cannot be its messages: expected types that msgspec knows"
        raise RegistrationError(message) from error
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
    return lambda message: decode_json(message, decoder, what="a message")


def closing(error: HarperError) -> tuple[int, bytes]:
    """The code and the reason that a connection is closed with."""
    unfit = isinstance(error, InvalidBody)
    code = _NOT_WHAT_IT_SAYS if unfit else _CODES.get(error.status, _FAILED)
    return code, error.public_message.encode()[:_REASON_BYTES].decode(errors="ignore").encode()


def _parts(kind: Any) -> set[Any]:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return set(typing.get_args(kind)) if union else set()


def _as_it_is(message: Message, kind: type[Message]) -> Message:
    if isinstance(message, kind):
        return message
    told = "text" if kind is str else "bytes"
    refusal = f"a message is not what is read here: expected {told}"
    raise ClientError(refusal, status=415, code="unsupported_message")

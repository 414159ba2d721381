"""What comes in and what goes out: Body, Response, Blob, EventStream."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from .errors import HarperError, InvalidBody, PayloadTooLarge
from .forms import Parts
from .names import CONTENT_TYPE
from .pointers import hint, pointer, told
from .sse import encode_json

T = TypeVar("T")

_ANY = msgspec.json.Decoder()
_JSON = ("", "application/json")
_MULTIPART = "multipart/form-data"
_NO_DECODERS: Mapping[str, Callable[[bytes], Any]] = MappingProxyType({})


class Body(msgspec.Struct, eq=False):
    """A request's body, read when a handler asks for it, and once.

    What `stream()` or `parts()` have begun to read is not kept: whoever reads it again gets a
    `RuntimeError`. In the other ways it can be read again and again, before that.

    `await body` decodes by Content-Type, `multipart/form-data` into its `parts()`; `decode(T)`
    reads JSON into the type you name. The limit counts what a compressed body becomes.
    """

    whole: builtins.bytes | None = b""
    """All of it, while it is here: else `await body.bytes()`."""
    content_type: str = ""
    """Its type, without parameters and in small letters; empty if none is said."""
    _told: str = ""
    _chunks: AsyncIterable[builtins.bytes] | None = None
    _limit: int = 0
    _length: int | None = None
    _decoders: Mapping[str, Callable[[builtins.bytes], Any]] = _NO_DECODERS
    arriving: bool = False
    """Whether it is being read and has not ended."""

    # What it holds is no log's business.
    __repr__ = object.__repr__

    def __await__(self) -> Generator[Any, None, Any]:
        return self._decoded().__await__()

    async def bytes(self) -> bytes:
        """The whole body. Raises `PayloadTooLarge` above the server's limit."""
        if self.whole is None:
            self.whole = b"".join([chunk async for chunk in self.stream()])
        return self.whole

    def release(self) -> None:
        """Let its bytes go, as before an answer that may last. From then on it is empty."""
        self.whole = b""

    async def stream(self) -> AsyncIterator[builtins.bytes]:
        """The body as it arrives, never more than the server's limit of it."""
        if self._length is not None and self._length > self._limit:
            raise PayloadTooLarge(self._limit)
        chunks, self._chunks = self._chunks, None
        if chunks is None:
            yield self._taken()
            return
        taken = 0
        self.arriving = True
        async for chunk in chunks:
            taken += len(chunk)
            if taken > self._limit:
                raise PayloadTooLarge(self._limit)
            yield chunk
        self.arriving = False

    def _taken(self) -> builtins.bytes:
        """What is here by now, for one reader alone, however short it is and however it came."""
        whole = self.whole
        if whole is None:
            message = "stream() or parts() have read this body, and nobody has kept it"
            raise RuntimeError(message)
        # All requests of a connection that have none may have the same.
        if whole:
            self.whole = None
        return whole

    async def text(self) -> str:
        """The whole body as UTF-8. Raises `InvalidBody` where it is not."""
        try:
            return (await self.bytes()).decode()
        except UnicodeDecodeError as error:
            message = f"the body is not UTF-8: {error.reason} at byte {error.start}"
            raise InvalidBody(message) from error

    def parts(self) -> Parts:
        """The fields and files of a `multipart/form-data` body, as they arrive.

        Raises `InvalidBody` for a body of another type, or one that ends early.
        """
        if self.content_type != _MULTIPART:
            message = f"Content-Type: expected {_MULTIPART}, got {self.content_type or 'none'}"
            raise InvalidBody(message)
        return Parts(self.stream(), self._told)

    @property
    def is_json(self) -> bool:
        """Whether its Content-Type is one of JSON, or not said."""
        return self.content_type in _JSON or self.content_type.endswith("+json")

    async def decode(self, kind: type[T] | msgspec.json.Decoder[T]) -> T:
        """The JSON body as `kind` (a type or a ready decoder).

        Raises `InvalidBody` whose `param` is the path of what does not fit.
        """
        if not self.is_json:
            message = f"Content-Type: expected application/json, got {self.content_type}"
            raise InvalidBody(message)
        data = await self.bytes()
        if not data:
            message = "expected a JSON body, got an empty one"
            raise InvalidBody(message)
        return decode_json(data, kind)

    async def _decoded(self) -> Any:
        """By Content-Type: text as str, what nobody reads as bytes; None without a body."""
        if self.content_type == _MULTIPART:
            return self.parts()
        data = await self.bytes()
        if not data:
            return None
        if (decoder := self._decoders.get(self.content_type)) is not None:
            return _read(data, decoder, self.content_type)
        if self.content_type.startswith("text/"):
            return await self.text()
        looks_so = data.lstrip()[:1] in (b"{", b"[", b'"')
        is_json = self.is_json if self.content_type else looks_so
        return decode_json(data, _ANY) if is_json else data


def body_of(
    told: str,
    limit: int,
    decoders: Mapping[str, Callable[[bytes], Any]],
    chunks: AsyncIterable[bytes] | None = None,
    length: int | None = None,
) -> Body:
    """A body of the type that was told, empty, or in chunks that are to come.

    `limit` is how many bytes it may have, `length` how many it is said to have.
    """
    named = told if told in _JSON else told.partition(";")[0].strip().lower()
    whole = b"" if chunks is None else None
    return Body(whole, named, told, chunks, limit, length, decoders)


def _read(data: bytes, decoder: Callable[[bytes], Any], content_type: str) -> Any:
    try:
        return decoder(data)
    except HarperError:
        raise
    except Exception as error:
        message = f"the body is not valid {content_type}"
        raise InvalidBody(message) from error


def decode_json(
    data: bytes | str, kind: type[T] | msgspec.json.Decoder[T], *, what: str = "the body"
) -> T:
    """JSON as `kind`. Raises `InvalidBody` with the path of what does not fit.

    `what` is what a refusal of no JSON at all calls it.
    """
    try:
        if isinstance(kind, msgspec.json.Decoder):
            return kind.decode(data)
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise refused(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"{what} is not valid JSON: {error}"
        raise InvalidBody(message) from error
    except RecursionError as error:
        message = f"{what} is nested too deeply"
        raise InvalidBody(message) from error


def refused(error: msgspec.ValidationError, kind: Any = None) -> InvalidBody:
    """The refusal for a value of the wrong shape, with its path as `param` and JSON pointer.

    Where `kind` is the Struct it was meant for, it says the nearest field, or the words expected.
    """
    text, path = told(str(error))
    text += hint(text, path, kind)
    return InvalidBody(
        f"{path}: {text}" if path else text,
        param=path or None,
        errors=[{"path": pointer(path), "message": text}],
    )


class Response:
    """An answer with its own status and headers.

    `data` is serialised by negotiation; `body` (str, bytes, or an iterable of them) is written as
    it is.
    """

    __slots__ = ("body", "data", "headers", "status")

    def __init__(
        self,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        *,
        data: Any = msgspec.UNSET,
        body: str | bytes | AsyncIterable[str | bytes] | Iterable[str | bytes] | None = None,
    ) -> None:
        if body is not None and isinstance(body, Mapping):
            # Its keys would be sent, one after the other.
            message = "Response: body takes text, bytes or an iterable of them; data takes a dict"
            raise TypeError(message)
        self.status = status
        self.headers: dict[str, str] = {**headers} if headers else {}
        self.data = data
        self.body = body


class ResponseError(HarperError):
    """Raise it to answer with this very `Response`, past `present_error`.

    It is an answer like any other to the client, and a failure to what encloses the verb: what
    rolls back when a verb raises, rolls back.
    """

    def __init__(self, response: Response) -> None:
        super().__init__(f"answered {response.status}", status=response.status)
        self.response = response


class Blob:
    """`data` sent as it is under a media type of its own, whatever the client's `Accept` says."""

    __slots__ = ("content_type", "data")

    def __init__(self, content_type: str, data: str | bytes) -> None:
        self.content_type = content_type
        self.data = data


class EventStream:
    """Events, sent as `text/event-stream` whatever the client's `Accept` says."""

    __slots__ = ("events", "headers")

    def __init__(
        self,
        events: AsyncIterable[Any] | Iterable[Any],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.events = events
        self.headers: dict[str, str] = dict(headers or {})


def json_response(status: int, data: Any, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer whatever the client's `Accept` says, for error shapes that clients parse."""
    response = Response(status, headers)
    response.headers[CONTENT_TYPE] = "application/json"
    response.body = encode_json(data)
    return response

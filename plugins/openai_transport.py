"""What a provider that speaks OpenAI's protocol answers; its failures as harperpy's errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Literal, TypeVar

import msgspec
from multidict import CIMultiDict

from harperpy import BackendError, Batched, GenerateChunk, HarperError, SSEDecoder

from .openai_answers import ChunkReader
from .openai_exchange import Answer, Exchange, Timeouts, Upstream
from .openai_pattern import Pattern
from .openai_pool import Pool
from .openai_refusals import refusal, told_refusal
from .openai_session import Session

T = TypeVar("T")

_MOST_ANSWER = 256 << 20
_MOST_ERROR = 256 << 10
_OK = 200


class Transport:
    """One provider's connections. `kept=False` closes each after its answer.

    `through` is what they are made with: our own, or aiohttp's client, which knows proxies.
    Raises `ConfigError` for what no request can be made of.
    """

    def __init__(
        self,
        base: str,
        *,
        secret: str | None,
        timeouts: Timeouts,
        headers: dict[str, str] | None = None,
        kept: bool = True,
        through: Literal["own", "aiohttp"] = "own",
    ) -> None:
        self._secret = secret
        self._first_byte = timeouts.first_byte
        self._stream_first_byte = timeouts.stream_first_byte
        # Firewalls before providers refuse who does not say what it is.
        known = CIMultiDict({"Content-Type": "application/json", "User-Agent": "harperpy"})
        known.update(headers or {})
        if secret:
            known["Authorization"] = f"Bearer {secret}"
        kind = Pool if through == "own" else Session
        self._upstream: Upstream = kind(base, known, timeouts, kept=kept)

    async def whole(
        self,
        path: str,
        body: bytes | None,
        read: Callable[[bytes], T],
        call_id: int | None = None,
        *,
        most: int = _MOST_ANSWER,
    ) -> T:
        """The JSON answer to a post, or a get of what has no body, as `read` takes it.

        Raises `BackendError`, also for one of more than `most` bytes, and what `refusal` makes.
        """
        exchange = self._upstream.send(path, body, self._first_byte, call_id)
        try:
            data = await exchange.answer
            if not isinstance(data, bytes):
                data = await _read_all(await self._good(data), most)
        except BaseException:
            exchange.close()
            raise
        try:
            return read(data)
        except (msgspec.DecodeError, UnicodeDecodeError, BackendError) as error:
            # No error is long, and to look for one in all of a long answer would keep the loop.
            told = told_refusal(data, self._secret) if len(data) <= _MOST_ERROR else None
            if told is not None:
                told.usage = getattr(error, "usage", None)
                raise told from error
            if isinstance(error, BackendError):
                raise
            message = f"the answer from {path} is not what it should be"
            raise BackendError(message) from error

    def chunks(
        self, path: str, body: bytes, n: int | None = None, call_id: int | None = None
    ) -> Batched[GenerateChunk]:
        """The chunks of `n` streamed answers, those together that one read brought.

        Raises `BackendError` for one that is cut off.
        """
        chunks = _Chunks(n, self._secret)
        return Batched(self._batches(chunks, path, body, call_id), chunks.divert)

    async def _batches(
        self, chunks: _Chunks, path: str, body: bytes, call_id: int | None
    ) -> AsyncGenerator[list[GenerateChunk]]:
        reader = chunks.reader
        exchange = chunks.exchange = self._upstream.send(
            path, body, self._stream_first_byte, call_id
        )
        # It may be long, and so may the answer take.
        del body
        batch: list[GenerateChunk] = []
        try:
            read, answer = await exchange.answer, None
            if not isinstance(read, bytes):
                chunks.answer = answer = await self._good(read)
                read = await answer.read()
            while read:
                chunks.read(read, batch)
                if reader.ended:
                    exchange.finish()
                # The next may take long to come: nothing of this one is kept meanwhile.
                read = b""
                if batch:
                    yield batch
                    batch = []
                if answer is not None and not reader.ended:
                    read = await answer.read()
            chunks.end(batch)
        except HarperError as error:
            error.usage = reader.unheard
            if batch:
                yield batch
            # What breaks off after the answer's end takes nothing from it.
            if not reader.is_complete:
                raise
            batch = []
        finally:
            exchange.close()
            # It leads back to here.
            chunks.sink = _nobody
        if batch := [*batch, *reader.finish()]:
            yield batch

    async def close(self) -> None:
        """Close the connections."""
        await self._upstream.close()

    async def _good(self, answer: Answer) -> Answer:
        """The answer, if it is a good one. Raises what `refusal` makes of any other."""
        if answer.status == _OK:
            return answer
        told = await _read_all(answer, _MOST_ERROR)
        raise refusal(answer.status, told, answer.headers, self._secret)


class _Chunks:
    """How far a streamed answer has been read, in whichever way each part of it comes."""

    __slots__ = ("_pattern", "answer", "events", "exchange", "reader", "sink")

    def __init__(self, n: int | None, secret: str | None) -> None:
        self.reader = ChunkReader(n, secret)
        self.events = SSEDecoder()
        self.exchange: Exchange | None = None
        self.answer: Answer | None = None
        self.sink: Callable[[Sequence[GenerateChunk | str]], bool] = _nobody
        # That of what comes next, if it begins with an event.
        self._pattern: Pattern | None = None

    def divert(self, sink: Callable[[Sequence[GenerateChunk | str]], bool]) -> None:
        """See `Batched`."""
        if self.answer is not None:
            self.sink = sink
            self.answer.divert(self._take, together=True)

    def read(self, read: bytes, batch: list[GenerateChunk]) -> None:
        """Put the chunks of what was read into a batch, until one raises."""
        self._pattern = None
        self.reader.read_all(self.events.feed(read), batch)
        if not self.events.pending:
            self._pattern = self.reader.pattern

    def end(self, batch: list[GenerateChunk]) -> None:
        """Put what it ended in the middle of into a batch, or raise what that tells."""
        if rest := self.events.pending:
            events = [*self.events.end()]
            # Some answer as to who wants no stream, or end one with an error in that form.
            if not events and rest.lstrip().startswith((b"{", b"[")):
                events = [rest.decode(errors="replace")]
            self.reader.read_all(events, batch)

    def _take(self, read: bytes) -> bool:
        pieces: Sequence[GenerateChunk | str] = ()
        if (pattern := self._pattern) is not None:
            pieces, read = pattern.pieces(read)
            if not read:
                return not pieces or self.sink(pieces)
        more = True
        batch = list[GenerateChunk]()
        try:
            self.read(read, batch)
        finally:
            if pieces or batch:
                more = self.sink([*pieces, *batch])
        if self.reader.ended and self.exchange is not None:
            self.exchange.finish()
        return more


def _nobody(_: Sequence[GenerateChunk | str]) -> bool:
    return False


async def _read_all(answer: Answer, most: int) -> bytes:
    """The whole body. Raises `BackendError` for one that is larger, or breaks off."""
    parts: list[bytes] = []
    left = most

    def take(read: bytes) -> bool:
        nonlocal left
        left -= len(read)
        if left < 0:
            message = f"an answer of more than {most} bytes"
            raise BackendError(message)
        parts.append(read)
        return True

    answer.divert(take)
    while read := await answer.read():
        take(read)
    return b"".join(parts)

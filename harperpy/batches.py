"""Batches: items of a stream that came together, for whoever can use them together."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from .backend import aclose, aiterate
from .sse import SSE, Encoded

T = TypeVar("T")

Divert: TypeAlias = Callable[[Callable[[T], bool]], None]
"""Gives a function each batch that comes while a reader waits for one, in place of the reader.

That spares the way through all of a stream's iterators. When the function says no, the reader gets
the next; it always gets the end, and what goes wrong, in the function too.
"""

_NONE: Any = object()
# What stands around the data of a plain event.
_BEFORE, _AFTER = b"data: ", b"\n\n"


class Texts(tuple[str, ...]):
    """A batch that is pieces of the first answer's text and nothing else, none of them empty."""

    __slots__ = ()


class Batched(AsyncIterator[T], Generic[T]):
    """A stream of items whose source brings several at a time.

    It is iterated one by one, or all that comes together by `batches`; closing it closes the
    source. `divert(sink)`, of a source that can, gives `sink` each batch that comes while a reader
    waits for it, in place of the reader, until `sink` says no. A chunk that is nothing but the
    first answer's text may come as that text, and a batch of nothing else as `Texts`.
    """

    __slots__ = ("_batches", "_left", "divert")

    def __init__(
        self, batches: AsyncIterator[Sequence[T]], divert: Divert[Sequence[T | str]] | None = None
    ) -> None:
        self._batches = batches
        self._left: Iterator[T] = iter(())
        self.divert = divert

    async def __anext__(self) -> T:
        while (item := next(self._left, _NONE)) is _NONE:
            self._left = iter(await anext(self._batches))
        return item

    def batches(self) -> AsyncIterator[Sequence[T]]:
        """What comes from now on, with what is left of a batch that was begun."""
        if not (left := [*self._left]):
            return self._batches
        self.divert = None
        return _after(left, self._batches)

    async def aclose(self) -> None:
        """Close the source."""
        await aclose(self._batches)


class EncodedEvents(AsyncIterator[SSE]):
    """Events of plain one-line data, several at a time; for who sends them as their bytes."""

    __slots__ = ("_batches", "_left", "divert")

    def __init__(self, batches: AsyncIterator[Encoded], divert: Divert[bytes] | None) -> None:
        self._batches = batches
        self._left: Iterator[bytes] = iter(())
        self.divert = divert

    async def __anext__(self) -> SSE:
        while (data := next(self._left, None)) is None:
            batch = await anext(self._batches)
            self._left = iter(batch[len(_BEFORE) : -len(_AFTER)].split(_AFTER + _BEFORE))
        return SSE(data=data.decode())

    def encoded(self) -> AsyncIterator[Encoded]:
        """The bytes of each batch, the same that its events have one by one."""
        if not (left := [*self._left]):
            return self._batches
        self.divert = None
        events = (_AFTER + _BEFORE).join(left)
        return _after(Encoded(_BEFORE + events + _AFTER), self._batches)

    async def aclose(self) -> None:
        """Close the source."""
        await aclose(self._batches)


def batches_of(items: AsyncIterable[T] | Iterable[T]) -> AsyncIterator[Sequence[T]]:
    """The batches of any stream; of one that has none each item by itself."""
    return items.batches() if isinstance(items, Batched) else _singly(aiterate(items))


async def _after(first: T, others: AsyncIterator[T]) -> AsyncIterator[T]:
    try:
        yield first
        async for one in others:
            yield one
    finally:
        await aclose(others)


async def _singly(items: AsyncIterator[T]) -> AsyncIterator[Sequence[T]]:
    try:
        async for item in items:
            yield (item,)
    finally:
        await aclose(items)

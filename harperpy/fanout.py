"""Several answers at once from backends that give one at a time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from .backend import aclose
from .messages import Choice, GenerateChunk, GenerateResult, TokenUsage

T = TypeVar("T")


async def all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them return. The first failure ends the others and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _ended(tasks)


def joined(results: Sequence[GenerateResult]) -> GenerateResult:
    """One result of many: the first with the others beside it, and what all of them cost."""
    fields = Choice.__struct_fields__
    more = [Choice(**{field: getattr(other, field) for field in fields}) for other in results[1:]]
    others = [*results[0].others, *more]
    # A copy: a backend may give the same result again.
    usage = total(result.usage for result in results)
    return msgspec.structs.replace(results[0], others=others, usage=usage)


async def topped_up(
    stream: AsyncIterator[GenerateChunk], n: int, one: Callable[[int], AsyncIterator[GenerateChunk]]
) -> AsyncIterator[GenerateChunk]:
    """A stream that should hold `n` answers; those that never began are asked for one by one."""
    begun: set[int] = set()
    usage: TokenUsage | None = None
    try:
        async for chunk in stream:
            begun.add(chunk.index)
            usage = chunk.usage or usage
            yield msgspec.structs.replace(chunk, usage=None)
    finally:
        await aclose(stream)
    lacking = interleaved({index: one(index) for index in range(n) if index not in begun})
    try:
        async for chunk in lacking:
            usage = total((usage, chunk.usage))
            yield msgspec.structs.replace(chunk, usage=None)
    finally:
        await aclose(lacking)
    yield GenerateChunk(usage=usage)


async def interleaved(
    streams: Mapping[int, AsyncIterator[GenerateChunk]],
) -> AsyncIterator[GenerateChunk]:
    """The chunks of all streams as they come, each with its stream's index; the cost at the end.

    Each stream is stepped and closed by a task of its own, as generators want it. The first
    failure ends the others and is raised.
    """
    came: asyncio.Queue[GenerateChunk | BaseException | None] = asyncio.Queue()
    # One chunk of each stream at a time: one that never waits would leave the others no room.
    turns = {index: asyncio.Semaphore(1) for index in streams}
    # The last that each stream told: some count anew with every chunk.
    usages: dict[int, TokenUsage | None] = dict.fromkeys(streams)

    async def step(index: int, stream: AsyncIterator[GenerateChunk]) -> None:
        try:
            async for chunk in stream:
                usages[index] = chunk.usage or usages[index]
                await turns[index].acquire()
                # A copy: a backend may give the same chunk again, to another stream too.
                came.put_nowait(msgspec.structs.replace(chunk, index=index, usage=None))
        finally:
            await aclose(stream)

    async def pump(index: int, stream: AsyncIterator[GenerateChunk]) -> None:
        ended: BaseException | None = None
        try:
            await step(index, stream)
        except BaseException as error:  # noqa: BLE001  # raised by who reads the queue
            ended = error
        came.put_nowait(ended)

    tasks = [asyncio.create_task(pump(*one), name="one of n") for one in streams.items()]
    try:
        left = len(tasks)
        while left:
            item = await came.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
                turns[item.index].release()
        yield GenerateChunk(usage=total(usages.values()))
    finally:
        await _ended(tasks)


def total(usages: Iterable[TokenUsage | None]) -> TokenUsage | None:
    """The sum of what was counted; None where nothing was."""
    told = [usage for usage in usages if usage is not None]
    if not told:
        return None
    summed = TokenUsage()
    for field in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens"):
        counts = [count for usage in told if (count := getattr(usage, field)) is not None]
        if counts:
            setattr(summed, field, sum(counts))
    for field in ("prompt_details", "completion_details"):
        details: Counter[str] = Counter()
        for usage in told:
            details.update(getattr(usage, field) or {})
        setattr(summed, field, dict(details) or None)
    return summed


async def _ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

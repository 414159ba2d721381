"""Several answers at once from backends that give one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
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
    others = [Choice(**{field: getattr(other, field) for field in fields}) for other in results[1:]]
    # A copy: a backend may give the same result again.
    usage = total(result.usage for result in results)
    return msgspec.structs.replace(results[0], others=others, usage=usage)


async def interleaved(
    streams: Sequence[AsyncIterator[GenerateChunk]],
) -> AsyncIterator[GenerateChunk]:
    """The chunks of all streams as they come, each with its stream's index; the cost at the end.

    Each stream is stepped and closed by a task of its own, as generators want it. The first
    failure ends the others and is raised.
    """
    came: asyncio.Queue[GenerateChunk | BaseException | None] = asyncio.Queue()
    # One chunk of each stream at a time: one that never waits would leave the others no room.
    turns = [asyncio.Semaphore(1) for _ in streams]
    # The last that each stream told: some count anew with every chunk.
    usages: list[TokenUsage | None] = [None for _ in streams]

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

    tasks = [asyncio.create_task(pump(*one), name="one of n") for one in enumerate(streams)]
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
        yield GenerateChunk(usage=total(usages))
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
    return summed


async def _ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

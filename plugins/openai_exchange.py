"""Exchange: one request's answer as it comes in, whoever reads it from the network."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. `first_byte` counts to the answer's head, `idle` between two reads of it.

    An answer that is not streamed begins when it is done: without `first_byte` it has `total`.
    """

    total: float
    connect: float
    first_byte: float | None
    stream_first_byte: float
    idle: float


class Answer(Protocol):
    """An answer whose head is there. Header names are in lower case."""

    status: int

    @property
    def headers(self) -> Mapping[str, str]:
        """What its head says. Of a status of 200, where nobody asks, it may be empty."""
        ...

    async def read(self) -> bytes:
        """What has come of the body since the last time, at least a byte; nothing at its end.

        Raises `BackendError` where it breaks off, `BackendTimeout` where it takes too long.
        """
        ...

    def divert(self, sink: Callable[[bytes], bool], *, together: bool = False) -> None:
        """Give `sink` what comes while `read` waits, until it says no or raises.

        What it raises is raised by `read`. An answer that cannot do so leaves all to `read`. What
        comes fast may wait a moment to come `together`.
        """
        ...


class Exchange(Protocol):
    """A request, and what it brings. Who has one closes it, unless all of the body was there."""

    @property
    def answer(self) -> Awaitable[bytes | Answer]:
        """The body of a status of 200 that one read brought whole; else the answer, to be read.

        Raises `BackendError`, with `stale` where a kept connection was gone: whether the provider
        had read the request nobody knows. Raises `BackendTimeout` for what takes too long.
        """
        ...

    def finish(self) -> None:
        """No more is needed, as its end is near: what comes until then may be dropped."""
        ...

    def close(self) -> None:
        """Nothing more is wanted: an answer that is not at its end is broken off."""
        ...


class Upstream(Protocol):
    """Sends requests to one provider."""

    def send(
        self, path: str, body: bytes | None, first_byte: float | None, call_id: int | None
    ) -> Exchange:
        """Post, or get what has no body. Without `first_byte` a head may take the total time."""
        ...

    async def close(self) -> None:
        """Close the connections that are kept."""
        ...

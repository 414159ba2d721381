"""The way to a Valkey server: one connection, on which steps go in the order they are given."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from valkey.asyncio import SSLConnection, Valkey
from valkey.exceptions import NoScriptError, ReadOnlyError, ValkeyError

from .errors import ServiceUnavailable
from .secret import mask
from .valkey_scripts import Script

ANSWER_SECONDS = 2.0
"""How long a server may take to connect or to answer, unless the URL says `socket_timeout`."""


class Undone(ServiceUnavailable):
    """Nobody answers, and the step is not done."""


class _Step:
    """What is to be done, and who waits for it."""

    def __init__(self, script: Script, keys: Sequence[str], args: Sequence[object]) -> None:
        self.script = script
        self.given = [len(keys), *keys, *map(str, args)]
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Who asked may have left.
        self.answer.add_done_callback(lambda done: done.cancelled() or done.exception())


class ValkeyLine:
    """Sends steps one after the other, all that have come meanwhile together.

    Raises ValueError for a URL that cannot be, in words that may hold parts of it, and OSError
    where a certificate that it names cannot be read.
    """

    def __init__(self, url: str) -> None:
        try:
            self._client: Any = Valkey.from_url(
                url,
                decode_responses=True,
                socket_timeout=ANSWER_SECONDS,
                socket_connect_timeout=ANSWER_SECONDS,
            )
            _expect_name(self._client)
            # What the URL asks for is looked at when a connection is made, so make one.
            made = self._client.connection_pool.make_connection()
            if isinstance(made, SSLConnection):
                made.ssl_context.get()
        except (TypeError, ValkeyError) as error:
            raise ValueError(str(error)) from error
        self._waiting: list[_Step] = []
        self._sending: asyncio.Task[None] | None = None
        self._away = False

    def run(
        self, script: Script, keys: Sequence[str], args: Sequence[object]
    ) -> asyncio.Future[Any]:
        """What the step answers, later.

        Raises `Undone`, or `ServiceUnavailable` where it may be done and only the answer is lost.
        """
        step = _Step(script, keys, args)
        self._waiting.append(step)
        if self._sending is None:
            self._sending = asyncio.ensure_future(self._send_all())
        return step.answer

    async def close(self) -> None:
        """Send what is left, and hang up."""
        if self._sending is not None:
            await self._sending
        with contextlib.suppress(ValkeyError, OSError):
            await self._client.aclose()

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                steps, self._waiting = self._waiting, []
                await self._send(steps)
        finally:
            self._sending = None

    async def _send(self, steps: Sequence[_Step]) -> None:
        error: Exception = NoScriptError("the server forgets its scripts")
        sent = False
        try:
            if self._away:
                # Who asks meanwhile knows by this that nothing was done.
                await self._client.ping()
            self._away, sent = False, True
            unknown = await self._try(steps)
            if unknown:
                for text in {step.script.text for step in unknown}:
                    await self._client.script_load(text)
                await self._try(unknown)
        except (ValkeyError, OSError) as found:
            error, self._away = found, True
        for step in steps:
            if not step.answer.done():
                _answer(step, error, ServiceUnavailable if sent else Undone)

    async def _try(self, steps: Sequence[_Step]) -> list[_Step]:
        """Send them; those whose script the server does not know were not done."""
        pipe: Any = self._client.pipeline(transaction=False)
        for step in steps:
            pipe.execute_command("EVALSHA", step.script.sha, *step.given)
        answers: list[Any] = await pipe.execute(raise_on_error=False)
        if any(isinstance(answer, ReadOnlyError) for answer in answers):
            # Another one writes from now on; who it is shows a new connection.
            await self._client.connection_pool.disconnect()
        unknown: list[_Step] = []
        for step, answer in zip(steps, answers, strict=True):
            if isinstance(answer, NoScriptError):
                unknown.append(step)
            else:
                _answer(step, answer)
        return unknown


def _expect_name(client: Valkey) -> None:
    """Over TLS a certificate has to be the host's own, unless the URL wants none or any."""
    pool: Any = client.connection_pool
    options = pool.connection_kwargs
    if issubclass(pool.connection_class, SSLConnection) and options.get("ssl_cert_reqs") != "none":
        options.setdefault("ssl_check_hostname", True)


def _answer(step: _Step, answer: Any, kind: type[ServiceUnavailable] = Undone) -> None:
    if step.answer.cancelled():
        return
    if not isinstance(answer, Exception):
        step.answer.set_result(answer)
        return
    reason = mask(f"{answer}" or type(answer).__name__)
    away = kind(f"the Valkey server of the limits is away: {reason}", headers={"Retry-After": "1"})
    away.__cause__ = answer
    step.answer.set_exception(away)

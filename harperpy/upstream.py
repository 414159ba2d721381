"""ScriptedUpstream: a real provider on a real port that does exactly what a test tells it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, cast

import msgspec
from aiohttp import web

from .reconciling import Served
from .sse import encode_json, encode_sse

Moment = Literal["head", "body", "end"]
Reached = Literal["asked", "head", "body", "complete"]


class Answer(msgspec.Struct, kw_only=True):
    """What to answer. `body` (bytes, or anything as JSON) or `events` (SSE data, in order).

    `hang` waits before the head, before the body, or before the end; `cut` breaks the
    connection off after what was sent, before the head, or after a whole answer, as one does that
    was kept alive too long. Before each piece of the body it waits `pause` seconds.
    """

    status: int = 200
    headers: Mapping[str, str] = {}
    body: Any = None
    events: Sequence[Any] | None = None
    hang: Moment | None = None
    cut: bool | Literal["head", "after"] = False
    pause: float = 0.0


class ServedRequest(Served, kw_only=True):
    """What an upstream notes of a request: its tokens when it has sent them, and how far it got."""

    path: str
    model: str | None
    status: int | None = None
    reached: Reached = "asked"


class Asked(msgspec.Struct):
    """A request that came in; `left` once its client is gone before its answer was complete."""

    path: str
    headers: Mapping[str, str]
    body: Any
    left: bool = False


class ScriptedUpstream:
    """Speaks OpenAI's protocol at `url`. Without a script it answers by `usual(path, body)`.

    `requests` are those that came; `asked` and `left` are set when one comes, and when a client
    leaves before its answer is complete. `served` is the account of them, for `difference`: each
    by its `X-Client-Request-Id`, with the usage that was sent. GET /models comes when it likes and
    takes nothing from the script: `models` is its answer, `listed` are those requests. What hangs
    goes on once `released` is set.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Asked] = []
        self.served: list[ServedRequest] = []
        self.models = listing()
        self.listed: list[Asked] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
        self.released = asyncio.Event()
        self.usual: Callable[[str, Any], Answer] = usual_answer
        self._script: deque[Answer] = deque()

    def script(self, *answers: Answer) -> None:
        """Answer the next requests with these, one each."""
        self._script.extend(answers)

    async def handle(self, raw: web.BaseRequest) -> web.StreamResponse:
        """Answer one request by the script."""
        sent = await raw.read()
        body = msgspec.json.decode(sent) if sent else None
        asked = Asked(raw.path, raw.headers.copy(), body)
        try:
            if raw.method == "GET" and asked.path.endswith("/models"):
                self.listed.append(asked)
                return await self._answer(raw, self.models, _account(asked))
            answer = self._next(asked)
            return await self._answer(raw, answer, self.served[-1])
        except asyncio.CancelledError:
            asked.left = True
            self.left.set()
            raise

    def _next(self, asked: Asked) -> Answer:
        self.requests.append(asked)
        self.served.append(_account(asked))
        self.asked.set()
        return self._script.popleft() if self._script else self.usual(asked.path, asked.body)

    async def _answer(
        self, raw: web.BaseRequest, answer: Answer, served: ServedRequest
    ) -> web.StreamResponse:
        if answer.hang == "head":
            await self.released.wait()
        kind = "application/json" if answer.events is None else "text/event-stream"
        response = web.StreamResponse(
            status=answer.status, headers={"Content-Type": kind, **answer.headers}
        )
        if answer.cut == "head":
            _hang_up(raw)
            return response
        await response.prepare(raw)
        await response.write(b"" if answer.events is None else b": hello\n\n")
        served.status, served.reached = answer.status, "head"
        if answer.hang == "body":
            await self.released.wait()
        for piece in [answer.body] if answer.events is None else answer.events:
            if answer.pause:
                await asyncio.sleep(answer.pause)
            await response.write(_encoded(piece, event=answer.events is not None))
            served.reached = "body"
            _note(served, piece)
        if answer.hang == "end":
            await self.released.wait()
        if answer.cut is True:
            _hang_up(raw)
            return response
        await response.write_eof()
        served.reached = "complete"
        if answer.cut == "after":
            _hang_up(raw)
        return response


def _account(asked: Asked) -> ServedRequest:
    name = asked.headers.get("X-Client-Request-Id")
    return ServedRequest(id=name, path=asked.path, model=_told(asked.body).get("model"))


def _note(served: ServedRequest, piece: Any) -> None:
    usage = _told(_told(piece).get("usage"))
    served.prompt_tokens = usage.get("prompt_tokens", served.prompt_tokens)
    served.completion_tokens = usage.get("completion_tokens", served.completion_tokens)


def _told(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _hang_up(raw: web.BaseRequest) -> None:
    if raw.transport is not None:
        raw.transport.close()


def _encoded(piece: Any, *, event: bool) -> bytes:
    if isinstance(piece, bytes):
        return piece
    return encode_sse({"data": piece}) if event else encode_json(piece)


def chunk(
    delta: Mapping[str, Any], *, finish_reason: str | None = None, model: str = "scripted"
) -> dict[str, Any]:
    """A `chat.completion.chunk` with one choice."""
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


def streamed(*texts: str, done: bool = True) -> list[Any]:
    """The events of a streamed answer: texts, the reason, the usage, `[DONE]`."""
    events: list[Any] = [chunk({"role": "assistant", "content": None})]
    events += [chunk({"content": text}) for text in texts]
    if done:
        events.append(chunk({}, finish_reason="stop"))
        events.append({"choices": [], "usage": _usage(len(texts))})
        events.append("[DONE]")
    return events


def whole(text: str | None, **message: Any) -> dict[str, Any]:
    """A `chat.completion` with one choice."""
    calls = message.get("tool_calls")
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": "tool_calls" if calls else "stop",
            }
        ],
        "usage": _usage(1),
    }


def listing(*names: str) -> Answer:
    """The models an upstream has."""
    data = [{"id": name, "object": "model", "created": 1, "owned_by": "them"} for name in names]
    return Answer(body={"object": "list", "data": data})


def usual_answer(path: str, body: Any) -> Answer:
    """What an upstream without a script answers."""
    if path.endswith("/embeddings"):
        given = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [
            {"object": "embedding", "index": at, "embedding": [1.0, float(at)]}
            for at in range(len(given))
        ]
        usage = {"prompt_tokens": len(given), "total_tokens": len(given)}
        return Answer(body={"object": "list", "data": data, "model": "scripted", "usage": usage})
    if body and body.get("stream"):
        return Answer(events=streamed("Hello", " world"))
    return Answer(body=whole("Hello world"))


def _usage(completion: int) -> dict[str, Any]:
    return {"prompt_tokens": 3, "completion_tokens": completion, "total_tokens": 3 + completion}


@asynccontextmanager
async def scripted_upstream() -> AsyncGenerator[ScriptedUpstream]:
    """A scripted upstream on a free loopback port."""
    upstream = ScriptedUpstream()
    server = web.Server(upstream.handle, handler_cancellation=True, access_log=None)
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    upstream.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        yield upstream
    finally:
        await runner.cleanup()

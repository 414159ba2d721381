"""ScriptedUpstream: a real provider on a real port that does exactly what a test tells it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import msgspec
from aiohttp import web

from .sse import encode_json, encode_sse

Moment = Literal["head", "body", "end"]


class Answer(msgspec.Struct, kw_only=True):
    """What to answer. `body` (bytes, or anything as JSON) or `events` (SSE data, in order).

    `hang` waits for ever before the head, before the body, or before the end; `cut` breaks the
    connection off after what was sent.
    """

    status: int = 200
    headers: Mapping[str, str] = {}
    body: Any = None
    events: Sequence[Any] | None = None
    hang: Moment | None = None
    cut: bool = False


class Asked(msgspec.Struct):
    """A request that came in; `left` once its client is gone before its answer was complete."""

    path: str
    headers: Mapping[str, str]
    body: Any
    left: bool = False


class ScriptedUpstream:
    """Speaks OpenAI's protocol at `url`. Without a script it answers by `usual(path, body)`.

    `requests` are those that came; `asked` and `left` are set when one comes, and when a client
    leaves before its answer is complete. GET /models comes when it likes and takes nothing from
    the script: `models` is its answer, `listed` are those requests.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Asked] = []
        self.models = listing()
        self.listed: list[Asked] = []
        self.asked = asyncio.Event()
        self.left = asyncio.Event()
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
            return await self._answer(raw, self._next(raw.method, asked))
        except asyncio.CancelledError:
            asked.left = True
            self.left.set()
            raise

    def _next(self, method: str, asked: Asked) -> Answer:
        if method == "GET" and asked.path.endswith("/models"):
            self.listed.append(asked)
            return self.models
        self.requests.append(asked)
        self.asked.set()
        return self._script.popleft() if self._script else self.usual(asked.path, asked.body)

    async def _answer(self, raw: web.BaseRequest, answer: Answer) -> web.StreamResponse:
        if answer.hang == "head":
            await asyncio.Event().wait()
        kind = "application/json" if answer.events is None else "text/event-stream"
        response = web.StreamResponse(
            status=answer.status, headers={"Content-Type": kind, **answer.headers}
        )
        await response.prepare(raw)
        await response.write(b"" if answer.events is None else b": hello\n\n")
        if answer.hang == "body":
            await asyncio.Event().wait()
        for piece in _pieces(answer):
            await response.write(piece)
        if answer.hang == "end":
            await asyncio.Event().wait()
        if answer.cut and raw.transport is not None:
            raw.transport.close()
        else:
            await response.write_eof()
        return response


def _pieces(answer: Answer) -> list[bytes]:
    if answer.events is not None:
        return [event if isinstance(event, bytes) else encode_sse({"data": event})
                for event in answer.events]  # fmt: skip
    body = answer.body
    return [body if isinstance(body, bytes) else encode_json(body)]


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

"""openai_stream(): an answer's chunks in, OpenAI's chunk events and `[DONE]` out."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

from .backend import aclose, aiterate
from .errors import HarperError, ServerError
from .messages import GenerateChunk, TokenLogprob, TokenUsage, ToolCall, ToolCallDelta, as_json_text
from .sse import SSE, encode_json

logger = logging.getLogger("harperpy.streaming")

_TYPES = {
    403: "permission_error",
    429: "rate_limit_error",
}


def completion_id() -> str:
    """A fresh id for one completion."""
    # No secret: the system's generator would let go of the interpreter at each call.
    return f"chatcmpl-{random.getrandbits(128):032x}"


def openai_error(error: BaseException) -> dict[str, Any]:
    """OpenAI's error body for any error; of an unforeseen one only that it happened."""
    if not isinstance(error, HarperError):
        error = ServerError()
    kind = error.type or _TYPES.get(error.status)
    if kind is None:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.public_message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def openai_usage(usage: TokenUsage) -> dict[str, Any]:
    """OpenAI's usage object for a completion."""
    asked, answered = usage.prompt_tokens or 0, usage.completion_tokens or 0
    body: dict[str, Any] = {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
    }
    if usage.cached_tokens is not None:
        body["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    if usage.reasoning_tokens is not None:
        body["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    return body


def openai_logprobs(tokens: list[TokenLogprob] | None) -> dict[str, Any] | None:
    """OpenAI's logprobs object of a choice; null where none were asked for."""
    return None if tokens is None else {"content": tokens, "refusal": None}


async def openai_stream(
    tokens: AsyncIterable[GenerateChunk | str] | Iterable[GenerateChunk | str],
    *,
    model: str,
    id: str | None = None,  # noqa: A002
    include_usage: bool = False,
) -> AsyncIterator[SSE]:
    """`SSE` messages whose data are `chat.completion.chunk` objects, then `[DONE]`.

    An error before the first message is raised, so that it can still become a status. A later one
    ends the stream with an error message and no `[DONE]`. With `include_usage` the last chunk
    carries the usage and no choice.
    """
    encoder = _ChunkEncoder(model, id or completion_id(), include_usage=include_usage)
    source = aiterate(tokens)
    try:
        async for token in source:
            for delta in encoder.deltas(token):
                yield SSE(data=delta)
        yield SSE(data=encoder.finish())
        if include_usage and encoder.usage is not None:
            yield SSE(data=encoder.usage_chunk(encoder.usage))
        yield SSE(data="[DONE]")
    except Exception as error:
        if not encoder.started:
            raise
        logger.warning("a stream failed after it had begun: %r", error)
        yield SSE(data=encode_json(openai_error(error)).decode())
    finally:
        await aclose(source)


class _ChunkEncoder:
    """The envelope is encoded once; each delta is spliced into it."""

    def __init__(self, model: str, completion: str, *, include_usage: bool) -> None:
        envelope = {
            "id": completion,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._head = encode_json(envelope).decode()[:-1]
        self._usage_field = ',"usage":null' if include_usage else ""
        self._calls: dict[str | int, int] = {}
        self._reason: str | None = None
        self.started = False
        self.usage: TokenUsage | None = None

    def deltas(self, token: GenerateChunk | str) -> list[str]:
        """The chunks for one token: its text, its refusal, its pieces of tool calls."""
        if isinstance(token, str):
            return [self._chunk({"content": token})]
        if token.usage is not None:
            self.usage = token.usage
        if token.finish_reason is not None:
            self._reason = token.finish_reason
        chunks: list[str] = []
        if token.delta_content is not None:
            chunks.append(self._chunk({"content": token.delta_content}, logprobs=token.logprobs))
        if token.delta_refusal is not None:
            chunks.append(self._chunk({"refusal": token.delta_refusal}))
        if token.delta_tool_calls:
            calls = [self._call(delta) for delta in token.delta_tool_calls]
            chunks.append(self._chunk({"tool_calls": calls}))
        return chunks

    def finish(self) -> str:
        """The last chunk with a choice: nothing new, and why it ended."""
        reason = self._reason or ("tool_calls" if self._calls else "stop")
        return self._chunk({}, reason)

    def usage_chunk(self, usage: TokenUsage) -> str:
        """The chunk with the usage and no choice."""
        tail = encode_json({"choices": [], "usage": openai_usage(usage)}).decode()
        return f"{self._head},{tail[1:]}"

    def _chunk(
        self,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> str:
        if not self.started:
            self.started = True
            delta = {"role": "assistant", **delta}
        body = encode_json(delta).decode()
        ended = f'"{reason}"' if reason else "null"
        likely = encode_json(openai_logprobs(logprobs)).decode() if logprobs else "null"
        return (
            f'{self._head},"choices":[{{"index":0,"delta":{body},"logprobs":{likely},'
            f'"finish_reason":{ended}}}]{self._usage_field}}}'
        )

    def _call(self, delta: ToolCallDelta | ToolCall) -> dict[str, Any]:
        """Index on every piece; id, type and name on the first of a call only."""
        index = delta.index if isinstance(delta, ToolCallDelta) else None
        key = delta.id if index is None else index
        if key is None:
            key = next(reversed(self._calls), 0)
        known = key in self._calls
        index = self._calls.setdefault(key, len(self._calls))
        function: dict[str, Any] = {"arguments": as_json_text(delta.arguments)}
        if known:
            return {"index": index, "function": function}
        function = {"name": delta.name or "", **function}
        call_id = delta.id or f"call_{secrets.token_hex(12)}"
        return {"index": index, "id": call_id, "type": "function", "function": function}

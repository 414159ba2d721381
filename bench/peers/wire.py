"""OpenAI's wire as far as `limit.py` needs it: typed decoders, one encoder, events rewritten."""

import time
from typing import Any

import msgspec
from msgspec import Raw, Struct


class Message(Struct, omit_defaults=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(Struct, omit_defaults=True, gc=False):
    include_usage: bool = False


class ChatRequest(Struct, omit_defaults=True):
    model: str
    messages: list[Message]
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    seed: int | None = None
    user: str | None = None


class Usage(Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Said(Struct):
    role: str = "assistant"
    content: str | None = None
    refusal: str | None = None


class Choice(Struct):
    index: int
    message: Said
    logprobs: Any = None
    finish_reason: str | None = None


class ChatResponse(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class Delta(Struct, omit_defaults=True, gc=False):
    role: str | None = None
    content: str | None = None
    tool_calls: Raw | None = None


class ChunkChoice(Struct, gc=False):
    index: int = 0
    delta: Delta | None = None
    finish_reason: str | None = None


class Chunk(Struct, gc=False):
    choices: list[ChunkChoice] = []
    usage: Usage | None = None


class ChunkResponse(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChunkChoice]


class Result(Struct):
    """A whole answer without its wire."""

    text: str
    finish: str | None
    usage: Usage | None


class Piece(Struct, gc=False):
    """A part of a streamed answer without its wire."""

    text: str | None = None
    finish: str | None = None
    usage: Usage | None = None
    tool_calls: Raw | None = None
    role: str | None = None


class EmbeddingRequest(Struct, omit_defaults=True):
    model: str
    input: str | list[str]
    encoding_format: str | None = None
    dimensions: int | None = None
    user: str | None = None


class Model(Struct):
    id: str
    object: str = "model"
    created: int = 1700000000
    owned_by: str = "bench"


class Models(Struct):
    data: list[Model]
    object: str = "list"


encode = msgspec.json.Encoder().encode
decode_chat_request = msgspec.json.Decoder(ChatRequest).decode
decode_chat_response = msgspec.json.Decoder(ChatResponse).decode
decode_chunk = msgspec.json.Decoder(Chunk).decode
decode_embedding_request = msgspec.json.Decoder(EmbeddingRequest).decode
DONE = b"data: [DONE]\n\n"
MODELS = Models([Model("mock-model")])


def frame(data: bytes) -> bytes:
    """One chunk of HTTP's."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def chat_again(name: str, model: str, body: bytes) -> bytes:
    """A whole answer, decoded and made again."""
    answer = decode_chat_response(body)
    choice = answer.choices[0]
    result = Result(choice.message.content or "", choice.finish_reason, answer.usage)
    said = Choice(0, Said("assistant", result.text), None, result.finish)
    now = int(time.time())
    return encode(ChatResponse(name, "chat.completion", now, model, [said], result.usage))


def piece(payload: bytes) -> Piece:
    """What an event of the provider says."""
    chunk = decode_chunk(payload)
    if not chunk.choices:
        return Piece(None, None, chunk.usage)
    choice = chunk.choices[0]
    delta = choice.delta
    if delta is None:
        return Piece(None, choice.finish_reason, chunk.usage)
    text, calls, role = delta.content, delta.tool_calls, delta.role
    return Piece(text, choice.finish_reason, chunk.usage, calls, role)


class Rewriter:
    """Bytes of a stream's events in, bytes of our own events out.

    What is the same in all events of a stream is encoded once; events are expected as providers
    send them, on one line each.
    """

    __slots__ = ("_after", "_before", "_envelope", "_tail")

    def __init__(self, name: str, model: str) -> None:
        now = int(time.time())
        whole = encode(ChunkResponse(name, "chat.completion.chunk", now, model, []))
        self._envelope = b"data: " + whole[: whole.rindex(b"[]")]
        self._before = self._envelope + b'[{"index":0,"delta":{"content":'
        self._after = b'},"finish_reason":null}]}\n\n'
        self._tail = b""

    def feed(self, data: bytes) -> bytes:
        """The events that these bytes complete."""
        parts = (self._tail + data if self._tail else data).split(b"\n\n")
        self._tail = parts.pop()
        one = self._one
        payloads = [part[6:] for part in parts]
        return b"".join([DONE if data == b"[DONE]" else one(piece(data)) for data in payloads])

    def _one(self, part: Piece) -> bytes:
        plain = part.finish is None and part.role is None and part.tool_calls is None
        if plain and part.text and part.usage is None:
            return self._before + encode(part.text) + self._after
        choices = [ChunkChoice(0, Delta(part.role, part.text), part.finish)]
        empty = part.text is None and part.finish is None and part.role is None
        usage = b',"usage":' + encode(part.usage) if part.usage else b""
        return self._envelope + (b"[]" if empty else encode(choices)) + usage + b"}\n\n"

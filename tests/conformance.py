"""What is valid by OpenAI's published schemas and by its client's own types."""

import base64
import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import jsonschema
import openai.types
import pydantic
import referencing
import referencing.jsonschema
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from helpers import Answered, events

SCHEMAS = json.loads(Path(__file__).with_name("openai-schemas.json").read_text("utf-8"))
REGISTRY = referencing.Registry().with_resource(
    "openai", referencing.jsonschema.DRAFT202012.create_resource(SCHEMAS)
)


def check_schema(name: str, value: Any) -> None:
    """The value is valid by OpenAI's schema of that name."""
    schema = {"$ref": f"openai#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(schema, registry=REGISTRY).validate(value)


def undeclared(value: Any, path: str = "") -> list[str]:
    """The paths of all fields that OpenAI's types do not declare."""
    if isinstance(value, pydantic.BaseModel):
        extra = [f"{path}.{name}" for name in value.model_extra or ()]
        fields = ((f"{path}.{name}", getattr(value, name)) for name in type(value).model_fields)
        return extra + [one for at, field in fields for one in undeclared(field, at)]
    if isinstance(value, list):
        return [one for at, item in enumerate(value) for one in undeclared(item, f"{path}[{at}]")]
    return []


def check_type(kind: type[pydantic.BaseModel], value: Any, more: tuple[str, ...] = ()) -> None:
    """The value is one of OpenAI's own types, strictly, with no field that it does not declare."""
    typed = kind.model_validate_json(json.dumps(value), strict=True)
    assert [*more] == undeclared(typed)


def check_embeddings(body: Any) -> list[list[float]]:
    """The vectors of a list of embeddings; base64 holds little-endian float32s."""
    for one in body["data"]:
        if isinstance(one["embedding"], str):
            packed = base64.b64decode(one["embedding"], validate=True)
            one["embedding"] = list(struct.unpack(f"<{len(packed) // 4}f", packed))
    check_schema("CreateEmbeddingResponse", body)
    check_type(openai.types.CreateEmbeddingResponse, body)
    assert [*range(len(body["data"]))] == [one["index"] for one in body["data"]]
    return [one["embedding"] for one in body["data"]]


def check_error(body: Any) -> None:
    """An error body that says all four things, and nothing else."""
    check_schema("ErrorResponse", body)
    assert {"error"} == set(body)
    assert {"message", "type", "param", "code"} == set(body["error"])
    check_type(openai.types.ErrorObject, body["error"])


def check_whole(completion: Any, more: tuple[str, ...] = ()) -> None:
    """A `chat.completion` that is complete, and says nothing more than OpenAI's."""
    check_schema("CreateChatCompletionResponse", completion)
    check_type(ChatCompletion, completion, more)
    assert completion["id"].startswith("chatcmpl-")
    # Always there in OpenAI's own answers, though its schema does not insist.
    assert {"prompt_tokens", "completion_tokens", "total_tokens"} <= set(completion["usage"])
    assert [*range(len(completion["choices"]))] == [one["index"] for one in completion["choices"]]


def check_stream(answer: Answered, *, choices: int = 1, usage: bool = False) -> None:
    """A stream whose every chunk is OpenAI's, and whose chunks make complete choices."""
    *chunks, done = events(answer.text)
    assert "[DONE]" == done
    for one in chunks:
        check_schema("CreateChatCompletionStreamResponse", one)
        check_type(ChatCompletionChunk, one)
        assert usage is ("usage" in one)
    for name in ("id", "created", "model", "object"):
        assert 1 == len({one[name] for one in chunks}), name
    assert chunks[0]["id"].startswith("chatcmpl-")
    if usage:
        last = chunks.pop()
        assert [] == last["choices"]
        assert last["usage"]["total_tokens"] > 0
        assert {None} == {one["usage"] for one in chunks}
    said: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for one in chunks:
        (piece,) = one["choices"]
        said[piece["index"]].append(piece)
    assert [*range(choices)] == sorted(said)
    for pieces in said.values():
        check_pieces(pieces)


def check_pieces(pieces: list[dict[str, Any]]) -> None:
    """The pieces of one choice: the role on the first, the reason on the last, null elsewhere."""
    fields = {"index", "delta", "logprobs", "finish_reason"}
    assert [fields] * len(pieces) == [set(one) for one in pieces]
    first, *others = [one["delta"] for one in pieces]
    assert "assistant" == first["role"]
    assert [] == [delta for delta in others if "role" in delta]
    *before, reason = [one["finish_reason"] for one in pieces]
    assert {None} >= set(before)
    calls: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for delta in (first, *others):
        for call in delta.get("tool_calls", ()):
            calls[call["index"]].append(call)
    assert [*range(len(calls))] == sorted(calls)
    old = any("function_call" in delta for delta in (first, *others))
    called = "tool_calls" if calls else "function_call"
    assert reason == called if calls or old else reason in ("stop", "length", "content_filter")
    for call in calls.values():
        check_call(call)


def check_call(pieces: list[dict[str, Any]]) -> None:
    """The pieces of one tool call: id, type and name on the first, arguments on all."""
    first, *others = pieces
    assert {"index", "id", "type", "function"} == set(first)
    assert {"name", "arguments"} == set(first["function"])
    assert "function" == first["type"]
    assert first["id"]
    assert first["function"]["name"]
    assert [{"index", "function"}] * len(others) == [set(one) for one in others]
    assert [{"arguments"}] * len(others) == [set(one["function"]) for one in others]
    json.loads("".join(one["function"]["arguments"] for one in pieces))

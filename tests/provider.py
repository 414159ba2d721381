"""A provider whose answer follows from what it is asked: the same for every client and language.

The last message decides, by its text:

- `fail STATUS`: that status, with OpenAI's error object; 429 and 503 say `Retry-After: 7`;
- `fail midway`: a stream's first words, then an error frame;
- `cut midway`: a stream's first words, then the connection is gone;
- `hang`: a stream's first words, then silence until the client leaves;
- `silence`: not even a status, until the client leaves;
- anything else: `You said: TEXT`, streamed word by word.

A tool's result is answered with `The tool says: TEXT`. Where `tools` are given (unless
`tool_choice` is none) the one that is named in the text, or the first, is called; with `twice` in
the text two times. Where `response_format` asks for JSON, JSON comes. A schema's numbers are taken
from the text in order (`add 3 and 4`), its enums are their first value, its strings are what the
text quotes ('so') in order, then `text`; JSON without a schema has the quoted words as its keys.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeAlias

from harperpy.testing import Answer, ScriptedUpstream, scripted_upstream

Object: TypeAlias = dict[str, Any]

MODELS = ("gpt-4o-mini", "vendor/large-1")
DIMENSIONS = 8
_HEAD = {"id": "chatcmpl-provider", "created": 1_700_000_000, "system_fingerprint": "fp_provider"}
_FAIL = re.compile(r"\bfail (\d{3})\b")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_QUOTED = re.compile(r"(?<!\w)'([^']+)'(?!\w)")


@asynccontextmanager
async def provider_upstream() -> AsyncGenerator[ScriptedUpstream]:
    """Such a provider on a free port; what a test scripts still goes first."""
    async with scripted_upstream() as upstream:
        upstream.usual = answer
        yield upstream


def answer(path: str, body: Any) -> Answer:
    """What the provider answers to a request."""
    if body is None:
        return _models(path)
    if path.endswith("/embeddings"):
        return _embeddings(body)
    text = last_text(body)
    if failed := _FAIL.search(text):
        return failure(int(failed[1]))
    if text == "silence":
        return Answer(hang="head")
    if body.get("stream"):
        return _stream(body, text)
    choices = [
        {"index": at, "message": _message(body), "logprobs": None, "finish_reason": _reason(body)}
        for at in range(body.get("n") or 1)
    ]
    return Answer(body=_envelope(body, "", choices=choices, usage=_usage(body)))


def failure(status: int) -> Answer:
    """OpenAI's error answer of a status."""
    headers = {"Retry-After": "7"} if status in (429, 503) else {}
    return Answer(status=status, headers=headers, body={"error": _error(status)})


def vector(given: Any, dimensions: int = DIMENSIONS) -> list[float]:
    """The embedding of a text or an array of tokens: fixed, and exact as 32-bit floats."""
    digest = hashlib.shake_128(json.dumps(given).encode()).digest(dimensions)
    return [(byte - 128) / 128 for byte in digest]


def last_text(body: Mapping[str, Any]) -> str:
    """The text of the last message."""
    content = body["messages"][-1].get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)


def _error(status: int) -> Object:
    return {
        "message": f"asked to fail with {status}",
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": "messages" if status < 429 else None,
        "code": f"failed_{status}",
    }


def _models(path: str) -> Answer:
    listed = [
        {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "provider"}
        for name in MODELS
    ]
    asked = path.partition("/models")[2].removeprefix("/")
    if not asked:
        return Answer(body={"object": "list", "data": listed})
    return Answer(body=listed[MODELS.index(asked)]) if asked in MODELS else failure(404)


def _embeddings(body: Mapping[str, Any]) -> Answer:
    given = body["input"]
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    vectors = [vector(one, body.get("dimensions") or DIMENSIONS) for one in inputs]
    packed = body.get("encoding_format") == "base64"
    data = [
        {"object": "embedding", "index": at, "embedding": _packed(floats) if packed else floats}
        for at, floats in enumerate(vectors)
    ]
    usage = {"prompt_tokens": 2 * len(data), "total_tokens": 2 * len(data)}
    return Answer(body={"object": "list", "data": data, "model": body.get("model"), "usage": usage})


def _packed(floats: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(floats)}f", *floats)).decode()


def _message(body: Mapping[str, Any]) -> Object:
    calls = _calls(body)
    message: Object = {"role": "assistant", "content": None if calls else _text(body)}
    return {**message, "refusal": None, **({"tool_calls": calls} if calls else {})}


def _reason(body: Mapping[str, Any]) -> str:
    return "tool_calls" if _calls(body) else "stop"


def _text(body: Mapping[str, Any]) -> str:
    text = last_text(body)
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        return json.dumps(_example(wanted["json_schema"].get("schema") or {}, text))
    if wanted.get("type") == "json_object":
        return json.dumps(dict.fromkeys(_QUOTED.findall(text), "text") or {"answer": text})
    said = "The tool says" if body["messages"][-1]["role"] == "tool" else "You said"
    return f"{said}: {text}"


def _calls(body: Mapping[str, Any]) -> list[Object]:
    text, choice = last_text(body), body.get("tool_choice")
    functions = [tool["function"] for tool in body.get("tools") or () if "function" in tool]
    if not functions or choice == "none" or body["messages"][-1]["role"] == "tool":
        return []
    wanted = choice["function"]["name"] if isinstance(choice, dict) else None
    named = [
        one for one in functions if one["name"] == wanted or (not wanted and one["name"] in text)
    ]
    function = (named or functions)[0]
    arguments = json.dumps(_example(function.get("parameters") or {}, text))
    return [
        {
            "id": f"call_{at}",
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }
        for at in range(2 if "twice" in text else 1)
    ]


def _example(schema: Mapping[str, Any], text: str) -> Any:
    """A value that obeys a schema, with the text's numbers and quoted words."""
    found = _Found(iter(_NUMBER.findall(text)), iter(_QUOTED.findall(text)))
    return _obey(schema, schema.get("$defs") or {}, found)


class _Found(NamedTuple):
    """What a text gives to those that fill a schema, one after the other."""

    numbers: Iterator[str]
    words: Iterator[str]


def _obey(schema: Mapping[str, Any], defs: Mapping[str, Any], found: _Found) -> Any:
    if reference := schema.get("$ref"):
        return _obey(defs[reference.rpartition("/")[2]], defs, found)
    if choices := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return _obey(choices[0], defs, found)
    kind = schema.get("type", "string" if "const" in schema or "enum" in schema else "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        parts = schema.get("properties") or {}
        return {name: _obey(part, defs, found) for name, part in parts.items()}
    if kind == "array":
        return [_obey(schema.get("items") or {"type": "string"}, defs, found)]
    return _single(schema, kind, found)


def _single(schema: Mapping[str, Any], kind: str, found: _Found) -> Any:
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if kind in ("integer", "number"):
        number = float(next(found.numbers, "1"))
        return int(number) if kind == "integer" else number
    if kind == "string":
        return next(found.words, "text")
    return {"boolean": True, "null": None}[kind]


def _stream(body: Mapping[str, Any], text: str) -> Answer:
    first = [_chunk(body, _delta({"role": "assistant", "content": ""}, at)) for at in _places(body)]
    begun = [*first, *(_chunk(body, _delta({"content": word}, 0)) for word in ("Once ", "upon "))]
    match text:
        case "fail midway":
            return Answer(events=[*begun, {"error": _error(500)}])
        case "cut midway":
            return Answer(events=begun, cut=True)
        case "hang":
            return Answer(events=begun, hang="end")
        case _:
            return Answer(events=[*first, *_rest(body)])


def _rest(body: Mapping[str, Any]) -> Iterator[Any]:
    for delta in _deltas(body):
        yield from (_chunk(body, _delta(delta, at)) for at in _places(body))
    for at in _places(body):
        yield _chunk(body, {**_delta({}, at), "finish_reason": _reason(body)})
    if (body.get("stream_options") or {}).get("include_usage"):
        yield {**_chunk(body), "usage": _usage(body)}
    yield "[DONE]"


def _deltas(body: Mapping[str, Any]) -> Iterator[Object]:
    calls = _calls(body)
    if not calls:
        yield from ({"content": word} for word in re.findall(r"\s*\S+\s*$|\s*\S+", _text(body)))
    for at, call in enumerate(calls):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        yield {"tool_calls": [{**call, "index": at, "function": {"name": name, "arguments": ""}}]}
        for start in range(0, len(arguments), 4):
            piece = {"arguments": arguments[start : start + 4]}
            yield {"tool_calls": [{"index": at, "function": piece}]}


def _places(body: Mapping[str, Any]) -> range:
    return range(body.get("n") or 1)


def _delta(delta: Object, index: int) -> Object:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _chunk(body: Mapping[str, Any], *choices: Object) -> Object:
    return _envelope(body, ".chunk", choices=[*choices])


def _envelope(body: Mapping[str, Any], kind: str, **more: Any) -> Object:
    return {**_HEAD, "object": f"chat.completion{kind}", "model": body.get("model"), **more}


def _usage(body: Mapping[str, Any]) -> Object:
    asked = sum(len(str(message.get("content") or "").split()) for message in body["messages"])
    said = sum(1 for _ in _deltas(body)) * len(_places(body))
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }

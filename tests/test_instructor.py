"""instructor, as it is, in a venv of its own: its openai package is older than the newest one."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clients import FAILURES, MODEL, SLOW, Live, asking
from harperpy.testing import Answer, whole
from helpers import one_at_a_time

HERE = Path(__file__).parent / "instructor_venv"
START_LIMIT = 60  # seconds


class Worker:
    """The process that does with instructor what it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def tell(self, live: Live, do: str, **options: Any) -> dict[str, Any]:
        """What came of a task: `answer` or `error`."""
        access = {"base_url": live.base_url, "api_key": live.api_key}
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps({'do': do, **access, **options})}\n")
        self._process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next line that the process says."""
        assert self._process.stdout is not None
        timer = threading.Timer(START_LIMIT, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        assert line, "the worker is gone: its traceback is above"
        return json.loads(line)

    def ok(self, live: Live, do: str, text: str = "add 3 and 4", **options: Any) -> Any:
        """The answer to a question, when all is well."""
        said = self.tell(live, do, **{"model": MODEL, "messages": asking(text), **options})
        assert "error" not in said, said
        return said["answer"]

    def failed(self, live: Live, do: str, text: str = "add 3 and 4", **options: Any) -> Any:
        """What is known of the error that a question ends in."""
        said = self.tell(live, do, **{"model": MODEL, "messages": asking(text), **options})
        return said["error"]


def python_of_venv() -> Path:
    """The interpreter of the venv with instructor, which is made once for these requirements."""
    requirements = HERE / "requirements.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = Path(sys.prefix) / f"instructor-{digest}"
    python, made = folder / "bin" / "python", folder / "made"
    with one_at_a_time(folder.with_suffix(".lock")):
        if not made.exists():
            _run("-m", "venv", "--clear", "--without-pip", str(folder))
            options = ("--quiet", "--disable-pip-version-check", "--no-deps")
            _run("-m", "pip", "--python", str(python), "install", *options, "-r", str(requirements))
            made.touch()
    return python


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, timeout=300)


@contextmanager
def started() -> Iterator[Worker]:
    """A worker, until the test is done with it."""
    pipe = subprocess.PIPE
    command = [str(python_of_venv()), str(HERE / "worker.py")]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        worker = Worker(process)
        try:
            worker.hear()
            yield worker
        finally:
            process.communicate(timeout=30)  # closes stdin, which ends the worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """The process with instructor."""
    with started() as worker:
        yield worker


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "FUNCTIONS", "JSON_SCHEMA"])
def test_an_answer_becomes_a_type(worker: Worker, live: Live, mode: str, *, later: bool) -> None:
    """As a tool's arguments or by a schema, blocking or not, with the usage it cost."""
    answer = worker.ok(live, "create", mode=mode, later=later)

    assert {"a": 3, "b": 4} == answer["sum"]
    assert answer["tokens"] > 4
    if mode == "JSON_SCHEMA":
        assert "Sum" == live.sent["response_format"]["json_schema"]["name"]
    else:
        assert "Sum" == live.sent["tool_choice"]["function"]["name"]


@pytest.mark.parametrize(
    ("mode", "text"), [("JSON", '{"a": 3, "b": 4}'), ("MD_JSON", '```json\n{"a": 3, "b": 4}\n```')]
)
def test_json_in_a_text_becomes_a_type(worker: Worker, live: Live, mode: str, text: str) -> None:
    """What a model without schemas writes is read as it stands."""
    live.upstream.script(Answer(body=whole(text)))

    assert {"a": 3, "b": 4} == worker.ok(live, "create", mode=mode)["sum"]
    assert (mode == "JSON") is ("response_format" in live.sent)


def test_a_wrong_answer_is_asked_again(worker: Worker, live: Live) -> None:
    """The conversation of the second try has the tool call that was wrong and what was wrong."""
    function = {"name": "Sum", "arguments": '{"a": "three", "b": 4}'}
    wrong = whole(None, tool_calls=[{"id": "call_0", "type": "function", "function": function}])
    function = {"name": "Sum", "arguments": '{"a": 3, "b": 4}'}
    right = whole(None, tool_calls=[{"id": "call_1", "type": "function", "function": function}])
    live.upstream.script(Answer(body=wrong), Answer(body=right))

    assert {"a": 3, "b": 4} == worker.ok(live, "create", mode="TOOLS")["sum"]
    assert ["user", "assistant", "tool"] == [one["role"] for one in live.sent["messages"]]
    assert "call_0" == live.sent["messages"][2]["tool_call_id"]


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_a_type_fills_as_it_streams(worker: Worker, live: Live, mode: str) -> None:
    """The fields come one after the other."""
    states = worker.ok(live, "partial", mode=mode)

    assert {"a": None, "b": None} == states[0]
    assert {"a": 3, "b": None} in states
    assert {"a": 3, "b": 4} == states[-1]


def test_many_of_a_type_stream(worker: Worker, live: Live) -> None:
    """All that an answer holds."""
    assert [{"a": 3, "b": 4}] == worker.ok(live, "iterable")


def test_a_text_stays_a_text(worker: Worker, live: Live) -> None:
    """Without a type the client is OpenAI's: whole and streamed, of the provider and the echo."""
    assert "You said: hello" == worker.ok(live, "text", "hello")
    assert "You said: hello" == worker.ok(live, "stream", "hello")
    assert "hello" in worker.ok(live, "text", "hello", model="echo")
    assert "hello" in worker.ok(live, "stream", "hello", model="echo")


@pytest.mark.parametrize("do", ["create", "partial"])
@pytest.mark.parametrize(("status", "text", "code"), FAILURES)
def test_a_providers_failure_keeps_its_status(
    worker: Worker, live: Live, do: str, *, status: int, text: str, code: str | None
) -> None:
    """The error of the client below comes through, and is not tried again."""
    error = worker.failed(live, do, text, mode="TOOLS")

    assert (status, code) == (error["status"], error["code"])
    assert 1 == len(live.upstream.requests)


REFUSED: Any = [
    (400, None, {"temperature": 3}),
    (401, "invalid_api_key", {"api_key": "hk_wrong"}),
    (403, "insufficient_permissions", {"api_key": "LISTER"}),
    (404, "model_not_found", {"model": "gone"}),
    (504, "timeout", {"model": SLOW}),
]


@pytest.mark.parametrize(("status", "code", "options"), REFUSED)
def test_the_gateways_refusal_keeps_its_status(
    worker: Worker, live: Live, status: int, code: str | None, options: dict[str, Any]
) -> None:
    """So does what the gateway refuses or waits too long for."""
    options = {name: live.lister_key if it == "LISTER" else it for name, it in options.items()}
    text = "silence" if status == 504 else "hello"
    error = worker.failed(live, "create", text, mode="TOOLS", **options)

    assert status == error["status"]
    assert (code or "temperature") in error["message"]


@pytest.mark.parametrize("text", ["fail midway", "cut midway"])
def test_a_failure_in_mid_stream_raises(worker: Worker, live: Live, text: str) -> None:
    """The end is an error, never a whole answer."""
    assert "API" in worker.failed(live, "stream", text)["type"]


async def test_a_stream_that_is_left_ends_at_the_provider(worker: Worker, live: Live) -> None:
    """Closing a stream half way closes the connection to the provider."""
    assert "Once " == worker.ok(live, "stream", "hang", leave=True)

    await live.until_left()


def test_twenty_calls_at_once(worker: Worker, live: Live) -> None:
    """Each of twenty calls gets its own answer."""
    assert {"answer": list(range(20))} == worker.tell(live, "many", times=20, model=MODEL)


def test_the_local_model_answers(worker: Worker, local_live: Live) -> None:
    """A real model fills a type, by tool and by schema."""
    for mode in ("TOOLS", "JSON_SCHEMA"):
        answer = worker.ok(local_live, "create", mode=mode, model="default")
        assert {"a", "b"} == set(answer["sum"])

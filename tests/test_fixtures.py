"""The fixtures of `harperpy.testing`, in the tests of somebody's project."""

import sys
from pathlib import Path

from commands import Done, execute
from harperpy.config import parse_config
from harperpy.testing import running, with_echo

PAID = """
models:
  generative:
    default: {backend: openai, model: big, apiKey: "${SOME_KEY}", fallback: [spare]}
    spare: {backend: openai, model: small, apiKey: "${SOME_KEY}"}
  embedding:
    default: {backend: openai, model: vectors, apiKey: "${SOME_KEY}"}
plugins: {needy: {path: needy.py}}
"""
NEEDY = """
def handle_application(scope):
    scope.secrets.get("SOME_KEY")
"""
CONFTEST = """
import pytest

from harperpy.testing import with_echo


@pytest.fixture
def harper_environ():
    return {"SOME_KEY": "made-up"}


@pytest.fixture
def harper_config(harper_config):
    return with_echo(harper_config)
"""
TEST = """
async def test_it(harper_client):
    body = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
    answer = await (await harper_client.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"] == "hello"
"""


async def run_tests(folder: Path, **files: str) -> Done:
    """What pytest says of a project, whose files are named without their `.py`."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    options = ("-p", "harperpy.testing", "-o", "asyncio_mode=auto", "--rootdir", str(folder))
    # What the server logs is not what pytest says.
    options = (*options, "--show-capture=no")
    return await execute(folder, sys.executable, "-m", "pytest", "-q", *options)


async def test_a_project_is_tested_without_its_keys(tmp_path: Path) -> None:
    """In an environment of its tests' own, on models that cost nothing."""
    (tmp_path / "config.yaml").write_text(PAID)

    done = await run_tests(tmp_path, needy=NEEDY, conftest=CONFTEST, test_it=TEST)

    assert 0 == done.code, done
    assert "1 passed" in done.out


async def test_a_plugin_that_does_not_start_is_told(tmp_path: Path) -> None:
    """The test fails with the cause, and not with a 404 of what the plugin would have mounted."""
    (tmp_path / "config.yaml").write_text("plugins: {needy: {path: needy.py}}\n")

    done = await run_tests(tmp_path, needy=NEEDY, test_it=TEST)

    assert 1 == done.code, done
    told = "plugin needy did not start: plugins.needy: the environment variable SOME_KEY is not set"
    assert told in done.out


async def test_echo_takes_each_models_names(tmp_path: Path) -> None:
    """A call finds it by the logical name, by the provider's, and as the next in line."""
    config = parse_config(
        PAID.partition("plugins")[0], source="config.yaml", environ={"SOME_KEY": "made-up"}
    )
    echoing = with_echo(config)

    assert ("spare",) == echoing.models.generative["default"].fallback
    async with running(echoing, directory=tmp_path) as server:
        models = server.server.core.models
        for name in ("default", "big", "spare", "small"):
            assert "hello" == (await models.generate("hello", model=name)).content
        assert 16 == len((await models.embed(["hello"], model="vectors"))[0])
        assert {"echo"} == {row["backend"] for row in await server.rows()}

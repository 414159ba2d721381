"""config.yaml as containers have it: mounted by itself, or not to be written."""

from pathlib import Path

import pytest

from commands import ADMIN, configured, mounting, names, operate, serving

MOUNT = "mount --bind ../config.yaml config.yaml"
READ_ONLY = {
    "the file": f"{MOUNT}; mount -o remount,bind,ro config.yaml",
    "the folder": "mount --bind . .; mount -o remount,bind,ro .; cd .",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project beside the file that is mounted into it."""
    project = configured(tmp_path / "project")
    text = "# Mine.\n" + (project / "config.yaml").read_text()
    (project / "config.yaml").write_text(text)
    (tmp_path / "config.yaml").write_text(text)
    return project


async def test_a_file_that_is_mounted_is_changed_where_it_is(project: Path) -> None:
    """No other can take its place; its comments stay, and nothing is left beside it."""
    mounted = project.parent / "config.yaml"
    before = mounted.read_text()
    run = ("run", "--root", "../data")
    async with serving(project, *run, environ=ADMIN, within=mounting(MOUNT)) as server:
        status, _, _ = await operate(server, "set_configuration", logging_level="error")

        assert 200 == status
    assert before + 'logging: {"level": "error"}\n' == mounted.read_text()
    assert ["config.yaml", "log"] == names(project)


@pytest.mark.parametrize("script", READ_ONLY.values(), ids=READ_ONLY)
async def test_a_file_that_cannot_be_written_is_told(project: Path, script: str) -> None:
    """It is no failure of the server; the audit tells of no change, as there was none."""
    run = ("run", "--root", "../data")
    async with serving(project, *run, environ=ADMIN, within=mounting(script)) as server:
        status, told, _ = await operate(server, "set_configuration", logging_level="error")
        _, noted, _ = await operate(server, "read_audit_log", table="config.yaml")

    message = "config.yaml cannot be written: Read-only file system"
    assert (409, message, []) == (status, told["error"], noted)

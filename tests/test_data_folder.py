"""The data folder: where it is, and whose."""

from pathlib import Path

from commands import configured, names, said, serving


async def test_paths_of_the_configuration_begin_at_the_project(tmp_path: Path) -> None:
    """From whichever folder it is served and asked, there is one data folder and one database."""
    project = configured(
        tmp_path / "project", "rootPath: data\ndatabase: {url: 'sqlite:///kept/calls.db'}\n"
    )
    async with serving(tmp_path, "dev", "project"):
        within = await said(project, "user", "list")
        without = await said(tmp_path, "user", "list", "--dir", "project")

    assert ["HDB_ADMIN"] == [one["username"] for one in within]
    assert within == without == await said(project, "user", "list")
    assert ["log", "project"] == names(tmp_path)
    assert ["calls.db"] == names(project / "kept")
    assert "secret.key" in names(project / "data")

"""What a user installs: the wheel, built from the sdist, in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

from harperpy.scaffold import TEMPLATES

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "harperpy": "harperpy",
    "resources": "harperpy/resources",
    "plugins": "harperpy/plugins",
    "examples": "harperpy/templates",
}


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; when it fails, what it printed is the reason."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """The repository's files, new ones included, without what git ignores."""
    # A checkout may belong to another user than the one who tests it.
    git = ("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others")
    listed = run(*git, "--exclude-standard", cwd=ROOT).split("\0")
    return [Path(name) for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from an sdist of the repository's files and nothing else."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, tree, cwd=dist)
    [built] = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with this wheel, and our dependencies but not our harperpy."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    python = Path(paths["scripts"]) / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    # A folder that a .pth file names is added without the .pth files in it: an editable install
    # stays out of sight.
    ours = {entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
    (Path(paths["purelib"]) / "dependencies.pth").write_text("\n".join(sorted(ours)))
    return python


def lend_commands(python: Path) -> None:
    """The commands of our dependencies, which tests and templates expect beside an interpreter."""
    for command in metadata.entry_points(group="console_scripts"):
        script = python.with_name(command.name)
        if not script.exists():
            name, run_it = command.attr.partition(".")[0], f"sys.exit({command.attr}())"
            lines = (f"#!{python} -P", "import sys", f"from {command.module} import {name}", run_it)
            script.write_text("\n".join((*lines, "")))
            script.chmod(0o755)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder that has nothing to do with the repository."""
    return tmp_path


def test_only_harperpy_stands_at_the_top(wheel: Path) -> None:
    """The root folders become sub-packages; nothing else lands in site-packages."""
    top = {name.partition("/")[0] for name in ZipFile(wheel).namelist()}
    version = wheel.name.split("-")[1]

    assert {"harperpy", f"harperpy-{version}.dist-info"} == top


def test_the_wheel_holds_the_repository(wheel: Path, files: list[Path]) -> None:
    """Every file of the four folders is in it, and no other."""
    expected = {
        "/".join((ROOMS[path.parts[0]], *path.parts[1:]))
        for path in files
        if path.parts[0] in ROOMS and len(path.parts) > 1
    }
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith("harperpy/")}

    assert expected == packed
    assert "harperpy/py.typed" in packed


def test_the_wheel_runs_nothing_at_start_up(wheel: Path) -> None:
    """Installing harperpy changes no other program of the same Python."""
    names = [Path(name).name for name in ZipFile(wheel).namelist()]

    assert [] == [n for n in names if n.endswith(".pth") or "customize" in n]


def test_the_wheel_can_be_imported_from_anywhere(python: Path, empty: Path) -> None:
    """All three packages come from the wheel, whatever the current folder."""
    code = "import harperpy.resources, harperpy.plugins, sys; print(harperpy.__file__, sys.prefix)"

    file, prefix = run(python, "-c", code, cwd=empty).split()

    assert Path(file).is_relative_to(prefix)


def test_the_command_is_installed(wheel: Path, python: Path, empty: Path) -> None:
    """`harperpy` stands beside the interpreter and knows its version."""
    assert wheel.name.split("-")[1] in run(python.with_name("harperpy"), "version", cwd=empty)


def test_the_installed_command_writes_every_template(python: Path, empty: Path) -> None:
    """They come with the wheel, byte for byte as they stand in the repository."""
    for name in TEMPLATES:
        run(python.with_name("harperpy"), "init", name, "--template", name, cwd=empty)
    written = [path for path in empty.rglob("*") if path.is_file()]

    assert written
    for path in written:
        assert (ROOT / "examples" / path.relative_to(empty)).read_bytes() == path.read_bytes()


def test_the_wheel_is_strictly_typed(python: Path, empty: Path) -> None:
    """A strict mypy has no complaint about any installed package of ours."""
    mypy = (sys.executable, "-m", "mypy", "--python-executable", python)
    config = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")

    assert "Success" in run(*mypy, *config, "--strict", "-p", "harperpy", cwd=empty)


@pytest.mark.slow
def test_the_tests_pass_on_the_wheel(python: Path) -> None:
    """What holds in the clone holds for what a user installs."""
    lend_commands(python)
    # As without them, no current folder is on the path of what runs them side by side.
    side_by_side = ("--dist=load", f"--tx=3*popen//python={python} -P")
    pytest_ = (python, "-P", "-m", "pytest", *side_by_side, "-m", "not slow")
    run(*pytest_, f"--ignore={Path(__file__)}", cwd=ROOT)

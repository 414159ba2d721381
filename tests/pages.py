r"""Runs the blocks of a page in order, in a folder of its own, as a reader would.

- A block whose first line names a file (`# resources.py`) is written there, in the current folder;
  `# resources.py, continued` goes on where it ended.
- `console`: each line after `$ ` is a command (a `\` at its end goes on), what follows is what it
  prints. `sh` and `bash` run as a whole, `python` without a file's name too; a `text` block after
  them is what they print. `...` stands for anything. `hk_...` in a command is the last key shown.
- `harperpy dev` and `harperpy run` go on, in another terminal as it were, until the next one. A
  page that calls a server without having started one gets one, and its key as `$KEY`.

Ports 9926 and 9925 become free ones, and models echo where the page's config.yaml has none.
"""

import doctest
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from helpers import quiet_port

SECONDS = 120
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w./-]+\.\w+)(, continued)?\n")
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
SERVES = re.compile(r"\bharperpy (?:dev|run)\b(?!.*--help)([^|;&]*)")
ECHO = {"default": {"backend": "echo"}}
WRAPPED = {
    "harperpy": "-c 'from harperpy.cli import main; main(prog_name=\"harperpy\")'",
    "pip": "-m pip",
    "pytest": "-m pytest",
}


class Reader:
    """Follows pages in a folder, in one shell, with one server running at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "home"
        self.folder.mkdir()
        self._state = folder / "state"
        self._log = folder / "log"
        self._ports = {"9926": str(quiet_port()), "9925": str(quiet_port())}
        # To a terminal curl shows no progress.
        (folder / ".curlrc").write_text("silent\nshow-error\n")
        self._environ = {**environment(folder / "venv"), "CURL_HOME": str(folder)}
        self._server: subprocess.Popen[str] | None = None
        self._serves = self.folder
        self._stale = False
        self._unasked = False
        self._key = ""
        self._printed = ""

    def follow(self, page: str) -> int:
        """Do all that a page says; how many blocks it has."""
        blocks = BLOCK.findall(page)
        for language, text in blocks:
            if named := FILE.match(text):
                self._write(self.folder / named[1], text, "a" if named[2] else "w")
            elif language == "text":
                agree(text, self._printed)
            elif language == "python":
                self._printed = self._run(f"python -c {shlex.quote(text)}")
            elif language == "console":
                assert text.startswith("$ "), f"no command in {text}"
                for command, expected in COMMAND.findall(text):
                    agree(expected, self._console(command, silent=not expected), command)
            else:
                assert language in ("sh", "bash"), f"what is a block of {language}?"
                self._printed = self._run(text)
        self._reloaded()
        return len(blocks)

    def leave(self) -> None:
        """Stop the server, which must end well."""
        server, self._server = self._server, None
        if server is not None:
            os.killpg(server.pid, signal.SIGTERM)
            server.communicate(timeout=20)
            assert 0 == server.returncode, self._log.read_text()

    def _write(self, file: Path, text: str, mode: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open(mode, encoding="utf-8") as opened:
            opened.write(self._here(text))
        if file.name == "config.yaml":
            self._configure(file)
        watched = file.suffix == ".py" or file == self._serves / "config.yaml"
        self._stale = self._stale or (watched and self._serves in file.parents)

    def _configure(self, file: Path) -> None:
        """Free ports, and models that need nothing."""
        config = yaml.safe_load(file.read_text()) if file.exists() else {}
        ports = (int(port) for port in self._ports.values())
        config.setdefault("http", {})["port"] = next(ports)
        network = config.setdefault("operationsApi", {}).setdefault("network", {})
        network["port"] = next(ports)
        config.setdefault("models", {"generative": ECHO, "embedding": ECHO})
        file.write_text(yaml.safe_dump(config, sort_keys=False))

    def _console(self, command: str, *, silent: bool) -> str:
        """One command; only what it prints may tell that it fails."""
        if serves := SERVES.search(command):
            self._unasked = False
            return self._serve(command, serves[1])
        return self._run(command, must_end_well=silent)

    def _run(self, command: str, *, must_end_well: bool = True) -> str:
        """Run to the end; what it prints, errors too."""
        if "9926" in command and self._server is None:
            self._serve_unasked()
            self._environ["KEY"] = self._key
        elif "pytest" not in command:
            self._reloaded()
        kept = f"trap 'pwd > {self._state}; env -0 >> {self._state}' EXIT\n"
        command = self._here(command.replace("hk_...", self._key))
        done = subprocess.run(
            ["bash", "-ec", kept + command],
            cwd=self.folder,
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert 0 == done.returncode or not must_end_well, f"{command}\n{done.stdout}"
        place, _, exported = self._state.read_text().partition("\n")
        self.folder = Path(place)
        self._environ = dict(one.split("=", 1) for one in exported.split("\0") if "=" in one)
        return self._shown(done.stdout)

    def _serve(self, command: str, arguments: str) -> str:
        """Start a server in place of the last one; what it prints until it is ready."""
        self.leave()
        folders = [one for one in shlex.split(arguments) if (self.folder / one).is_dir()]
        self._serves = self.folder / (folders or ["."])[0]
        self._configure(self._serves / "config.yaml")
        self._stale = False
        with self._log.open("w") as log:
            self._server = subprocess.Popen(
                ["bash", "-c", self._here(command)],
                cwd=self.folder,
                env=self._environ,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        ready, printed = self._heard("Ready on")
        if not ready:
            self._server.communicate()
            self._server = None
            printed += self._log.read_text()
        return self._shown(printed)

    def _serve_unasked(self) -> None:
        """Start a server, or start it anew, where the page leaves that to its readers."""
        self._unasked = True
        printed = self._serve("harperpy dev --no-reload", "")
        assert self._server, f"the server did not start:\n{printed}"

    def _reloaded(self) -> None:
        """Wait until the server has taken over what was changed."""
        if self._stale and self._unasked:
            self._serve_unasked()
        elif self._stale and self._server is not None:
            restarted, printed = self._heard("restarted:")
            assert restarted, f"the server did not restart:\n{printed}{self._log.read_text()}"
        self._stale = False

    def _heard(self, start: str) -> tuple[bool, str]:
        """Whether the server prints a line that begins so, and all up to there or to its end."""
        server = self._server
        assert server is not None
        assert server.stdout is not None
        patience = threading.Timer(SECONDS, server.kill)
        patience.start()
        printed = ""
        try:
            for line in server.stdout:
                printed += line
                if line.startswith(start):
                    return True, printed
        finally:
            patience.cancel()
        return False, printed

    def _here(self, text: str) -> str:
        for written, real in self._ports.items():
            text = text.replace(written, real)
        return text

    def _shown(self, printed: str) -> str:
        if keys := re.findall(r"hk_[\w-]+", printed):
            self._key = keys[-1]
        for written, real in self._ports.items():
            printed = printed.replace(real, written)
        return printed


def agree(expected: str, printed: str, command: str = "") -> None:
    """Hold what is printed to what the page shows."""
    want, got = expected.strip() + "\n", printed.strip() + "\n"
    if not doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS):
        message = f"$ {command}\nThe page shows\n{want}\nIn truth it is\n{got}"
        raise AssertionError(message)


def environment(folder: Path) -> dict[str, str]:
    """The variables of a shell in a new virtual environment that has all that ours has.

    What is installed there stays there, and nothing is fetched.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    ours = sysconfig.get_path("purelib")
    more = f"import site; site.addsitedir({ours!r})\n"
    (Path(paths["purelib"]) / "ours.pth").write_text(more)
    scripts = Path(paths["scripts"])
    for name, arguments in WRAPPED.items():
        (scripts / name).write_text(f'#!/bin/sh\nexec {scripts}/python -P {arguments} "$@"\n')
        (scripts / name).chmod(0o755)
    hidden = ("HARPERPY_", "HDB_", "OPENAI_", "PYTEST_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return {
        **kept,
        "PATH": f"{scripts}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "HARPERPY_OFFLINE": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # that is how pip spells it
        "PIP_NO_INDEX": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        # No plugin author has these.
        "PYTEST_ADDOPTS": "-pno:langsmith_plugin -pno:schemathesis -pno:hypothesispytest",
    }


@contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    """A reader who leaves nothing running."""
    reader = Reader(folder)
    try:
        yield reader
    finally:
        reader.leave()

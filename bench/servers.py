"""Starts what is measured, each in its own process on a port of this machine, and ends it again."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

from machine import LOAD_CPUS, SERVER_CPUS

PEERS = Path(__file__).parent / "peers"
HARPERPY = Path(sys.executable).with_name("harperpy")
# The backend's answers are worth nothing: any word opens it.
WORD = "Bearer bench"
PROXY = """
model_list:
  - model_name: "*"
    litellm_params: {{model: "openai/*", api_base: "{url}/v1", api_key: bench}}
general_settings: {{master_key: sk-bench}}
"""
CONFIG = """
http: {{host: 127.0.0.1, port: {port}, workers: {workers}}}
operationsApi: {{network: {{port: 0}}}}
models:
  generative: {{default: {entry}, "*": {entry}}}
  embedding: {{default: {entry}, "*": {entry}}}
"""


@dataclass(frozen=True)
class Target:
    """A server that answers: where, the backend's process behind it, and which version it is."""

    port: int
    pid: int
    upstream: int
    headers: Mapping[str, str] = field(default_factory=dict)
    version: str = ""

    @property
    def url(self) -> str:
        """The beginning of its addresses."""
        return f"http://127.0.0.1:{self.port}"


class Servers:
    """All that was started, to be ended together; none outlives the block that it is for."""

    def __init__(self, first_port: int) -> None:
        self._next = first_port
        self._stack = ExitStack()
        self._backend: Target | None = None

    def __enter__(self) -> Self:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Who is impatient now would leave servers behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._stack.close()
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def port(self) -> int:
        """The next free port."""
        while True:
            self._next += 1
            with suppress(OSError), socket.create_server(("127.0.0.1", self._next - 1)):
                return self._next - 1

    def start(
        self,
        command: list[str | Path],
        port: int,
        *,
        on: set[int] = SERVER_CPUS,
        headers: Mapping[str, str] | None = None,
        path: str = "/v1/models",
        environ: Mapping[str, str] | None = None,
        version: str = "",
    ) -> Target:
        """Start a server, and wait until it answers."""
        log = self.folder / f"{port}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**clean(os.environ), **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._stack.callback(end, process)
        os.sched_setaffinity(process.pid, on)
        backend = self._backend.pid if self._backend else process.pid
        target = Target(port, process.pid, backend, headers or {}, version)
        if not answers(target, path, process):
            message = f"{command[0]} does not start:\n{log.read_text()[-2000:]}"
            raise RuntimeError(message)
        return target

    @property
    def backend(self) -> Target:
        """The provider behind all of them."""
        if self._backend is None:
            port = self.port()
            command = [sys.executable, PEERS / "provider.py", "--port", str(port)]
            self._backend = self.start(command, port, on=LOAD_CPUS)
        return self._backend


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what would change a server's mind."""
    apart = ("HARPERPY_", "HDB_", "OPENAI_", "PYTHON", "HTTP_PROXY", "HTTPS_PROXY")
    return {name: value for name, value in environ.items() if not name.upper().startswith(apart)}


def end(process: subprocess.Popen[bytes]) -> None:
    """Have it stop; what does not is killed, with what it started."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(target: Target, path: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether it does within a minute."""
    asked = urllib.request.Request(target.url + path, headers=dict(target.headers))
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError):
            try:
                with urllib.request.urlopen(asked, timeout=5):
                    return True
            except urllib.error.HTTPError as refused:
                refused.close()
        time.sleep(0.02)
    return False


def harperpy(servers: Servers, *, workers: int = 1, on: set[int] = SERVER_CPUS) -> Target:
    """Ours: a new data folder with one administrator and one key, and all that `run` does."""
    port = servers.port()
    entry = f'{{backend: openai, baseUrl: "{servers.backend.url}/v1", apiKey: bench}}'
    folder = _project(servers, CONFIG.format(port=port, workers=workers, entry=entry))
    root = folder / "data"
    command = [HARPERPY, "run", folder, "--root", root, "--offline"]
    admin = {"HDB_ADMIN_USERNAME": "bench", "HDB_ADMIN_PASSWORD": secrets.token_urlsafe()}
    target = servers.start(command, port, on=on, environ=admin, path="/health")
    made = [HARPERPY, "key", "add", "bench", "--root", root, "--json"]
    said = subprocess.run(made, capture_output=True, check=True, cwd=folder).stdout
    headers = {"Authorization": f"Bearer {json.loads(said)['api_key']}"}
    return Target(port, target.pid, target.upstream, headers, metadata.version("harperpy"))


def ready_seconds(servers: Servers) -> float:
    """How long a server with the echo backend takes from its start to its first answer."""
    port = servers.port()
    folder = _project(servers, CONFIG.format(port=port, workers=1, entry="{backend: echo}"))
    command = [HARPERPY, "run", folder, "--root", folder / "data", "--offline"]
    admin = {"HDB_ADMIN_USERNAME": "bench", "HDB_ADMIN_PASSWORD": secrets.token_urlsafe()}
    began = time.monotonic()
    servers.start(command, port, environ=admin, path="/health")
    return time.monotonic() - began


def _project(servers: Servers, config: str) -> Path:
    folder = Path(tempfile.mkdtemp(dir=servers.folder))
    (folder / "config.yaml").write_text(config)
    return folder


def limit(servers: Servers) -> Target:
    """The least that Python can do: raw protocols on both sides, and nothing between."""
    port = servers.port()
    command = [sys.executable, PEERS / "limit.py", "--port", str(port)]
    return servers.start(command, port, environ={"UPSTREAM": servers.backend.url})


def naive(servers: Servers) -> Target | None:
    """FastAPI with OpenAI's client, where they are installed."""
    try:
        versions = ", ".join(
            f"{name} {metadata.version(name)}" for name in ("fastapi", "uvicorn", "openai")
        )
    except metadata.PackageNotFoundError:
        return None
    port = servers.port()
    options = [
        "--no-access-log",
        "--log-level",
        "warning",
        "--loop",
        "uvloop",
        "--http",
        "httptools",
    ]
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "naive:app",
        "--app-dir",
        PEERS,
        "--port",
        str(port),
    ]
    environ = {"UPSTREAM": servers.backend.url}
    return servers.start([*command, *options], port, environ=environ, version=versions)


def nginx(servers: Servers) -> Target | None:
    """Nginx, where it is installed: one worker that passes all on."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if not program:
        return None
    port, folder = servers.port(), _project(servers, "")
    text = (PEERS / "nginx.conf").read_text()
    for name, value in {"FOLDER": folder, "PORT": port, "UPSTREAM": servers.backend.port}.items():
        text = text.replace(f"${name}", str(value))
    (folder / "nginx.conf").write_text(text)
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr
    command: list[str | Path] = [program, "-c", folder / "nginx.conf", "-e", folder / "error.log"]
    return servers.start(command, port, version=said.strip().rpartition("/")[2])


def litellm(servers: Servers) -> Target | None:
    """LiteLLM's proxy, where `litellm` is on the path."""
    program = shutil.which("litellm")
    if not program:
        return None
    port, folder = servers.port(), _project(servers, PROXY.format(url=servers.backend.url))
    command = [
        program,
        "--config",
        folder / "config.yaml",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    return servers.start(
        command,
        port,
        headers={"Authorization": "Bearer sk-bench"},
        environ={
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_LOG": "ERROR",
            # The provider repeats itself.
            "REPEATED_STREAMING_CHUNK_LIMIT": "1000000",
        },
        path="/health/liveliness",
        version=_version_of(program),
    )


def _version_of(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\d+\.\d+[\w.]*", said.stdout)
    return found[0] if found else "unknown version"


def portkey(servers: Servers) -> Target | None:
    """Portkey's gateway, where npm has installed it here or for all."""
    npm = shutil.which("npm")
    roots = [Path.cwd() / "node_modules"]
    if npm:
        said = subprocess.run(
            [npm, "root", "--global"], capture_output=True, text=True, check=False
        )
        roots.append(Path(said.stdout.strip() or "."))
    found = [
        root / "@portkey-ai/gateway" for root in roots if (root / "@portkey-ai/gateway").is_dir()
    ]
    if not npm or not found:
        return None
    port = servers.port()
    version = json.loads((found[0] / "package.json").read_text())["version"]
    headers = {
        "Authorization": WORD,
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"{servers.backend.url}/v1",
    }
    command = ["node", found[0] / "build/start-server.js", f"--port={port}", "--headless"]
    return servers.start(command, port, headers=headers, path="/", version=version)


# Who is compared with ours, in the order of the table's columns.
FOUND: Mapping[str, Callable[[Servers], Target | None]] = {
    "limit": limit,
    "naive": naive,
    "nginx": nginx,
    "LiteLLM": litellm,
    "Portkey": portkey,
}

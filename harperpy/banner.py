"""What a server says of itself when it is ready: one screen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import click

from .registry import Entry
from .resource import PERMISSIONS
from .routing import ModelInfo
from .sections import Config, HttpConfig, NetworkConfig
from .server import Server

_GAP = "  "


def banner(server: Server, version: str) -> str:
    """Version, URLs, resources, models, what failed or is open, a first start's credentials."""
    core = server.core
    network = server.config.operations_api.network
    lines = [
        f"harperpy {version}",
        "",
        f"  REST         {http_url(server)}",
        f"  OpenAI       {http_url(server)}/v1",
        f"  Operations   {local_url(network.host, server.operations_port)}",
        f"  Data         {server.root}",
        "",
        "Resources",
        *_table(_resource(entry) for entry in core.resources),
        "",
        "Models",
        *_table(_models(server)),
    ]
    failed = [
        f"  {name}: {status.error}"
        for name, status in server.health.plugins.items()
        if status.status == "error"
    ]
    if failed:
        lines += ["", "Plugins that did not start", *failed]
    if opened := list(_warnings(server.config)):
        lines += ["", "Warnings", *opened]
    lines += _demo(core.models.list())
    if server.first_start is not None:
        lines += ["", *_first_start(server)]
    return "\n".join(lines)


def say(text: str, *, err: bool = False) -> None:
    """Print it, if it can be: a full disk, or a terminal that was closed, ends no server.

    Nor does a name that the terminal's encoding lacks.
    """
    with contextlib.suppress(OSError):
        try:
            click.echo(text, err=err)
        except UnicodeEncodeError:
            click.echo(text.encode("ascii", "backslashreplace").decode(), err=err)


def _warnings(config: Config) -> Iterator[str]:
    """What config.yaml opens to more than who has a credential, or a page of its own."""
    if config.authentication.authorize_local:
        yield "  authentication.authorizeLocal: who calls from this machine needs no credential"
    ports: dict[str, HttpConfig | NetworkConfig] = {
        "http": config.http,
        "operationsApi.network": config.operations_api.network,
    }
    for name, port in ports.items():
        if port.cors and "*" in port.cors_access_list:
            any_page = "pages of any origin may call; name those that may in corsAccessList"
            yield f"  {name}.cors: {any_page}"


def _demo(models: Iterable[ModelInfo]) -> list[str]:
    """What a demo model is, and the three lines of config that put a real one in its place."""
    about = {model.owned_by: model.about for model in models if model.about}
    if not about:
        return []
    return [
        "",
        *(f"The {backend} model is {text}." for backend, text in about.items()),
        "For real work point 'default' at a provider, in config.yaml:",
        "",
        "  models:",
        "    generative:",
        '      default: {backend: openai, model: gpt-4o-mini, apiKey: "${OPENAI_API_KEY}"}',
    ]


def ready(url: str, workers: int = 1) -> str:
    """The line after which connections are taken."""
    by = f" with {workers} workers" if workers > 1 else ""
    return f"\nReady on {url}{by} (Ctrl-C stops)"


def http_url(server: Server) -> str:
    """Where the REST port is reached from this machine."""
    return local_url(server.config.http.host, server.http_port)


def local_url(host: str | None, port: int) -> str:
    """Where a port is reached from this machine."""
    if host in (None, "localhost", "0.0.0.0", "::"):  # noqa: S104  # 'any' includes this machine
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _resource(entry: Entry) -> Sequence[str]:
    methods = [method for method in entry.allow if method not in ("HEAD", "OPTIONS")]
    return f"/{entry.path}", entry.resource.__name__, " ".join(methods), _who(entry)


def _who(entry: Entry) -> str:
    public = entry.public
    if public == PERMISSIONS:
        return "anyone"
    closed = "roles that grant it"
    return (
        f"{closed}; anyone may {', '.join(sorted(public))}" if public and entry.handlers else closed
    )


def _models(server: Server) -> Iterable[Sequence[str]]:
    for one in server.routes:
        backend = one.backend
        model = backend.provider_model or "as asked"
        yield one.name, one.kind, backend.name, model, backend.state


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _first_start(server: Server) -> list[str]:
    first = server.first_start
    if first is None:
        return []
    url = f"{http_url(server)}/v1"
    return [
        "First start: this is shown once, keep it.",
        f"  user      {first.username}",
        f"  password  {first.password}",
        f"  API key   {first.api_key}",
        "",
        "Try it:",
        "",
        f"curl {url}/chat/completions -H 'Authorization: Bearer {first.api_key}' \\",
        "  -H 'Content-Type: application/json' \\",
        '  -d \'{"messages": [{"role": "user", "content": "Say hello."}]}\'',
        "",
        "import openai",
        f'client = openai.OpenAI(api_key="{first.api_key}", base_url="{url}")',
        'messages = [{"role": "user", "content": "Say hello."}]',
        'answer = client.chat.completions.create(model="default", messages=messages)',
        "print(answer.choices[0].message.content)",
    ]

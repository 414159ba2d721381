"""The rules of the house: the order of files, what each room may import, how large things grow."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import harperpy

# The core in reading order: a file imports only files above it, for types too.
ORDER = (
    "errors",
    "spelling",
    "secret",
    "document",
    "leaves",
    "sections",
    "config",
    "signal",
    "vectors",
    "sse",
    "pointers",
    "forms",
    "names",
    "content",
    "records",
    "negotiation",
    "request",
    "handshake",
    "incoming",
    "inflating",
    "patterns",
    "epoch",
    "processors",
    "permission",
    "auth",
    "parts",
    "messages",
    "prompts",
    "vocabulary",
    "accounting",
    "segment",
    "journal",
    "journal_reader",
    "reconciling",
    "analytics",
    "backend",
    "batches",
    "outgoing",
    "fanout",
    "needs",
    "routing",
    "meters",
    "pricing",
    "rules",
    "limits",
    "recorder",
    "calls",
    "models",
    "streaming",
    "gate",
    "system",
    "daily",
    "booking",
    "migrations",
    "tables",
    "database",
    "attempts",
    "audit",
    "quotas",
    "repricing",
    "shared_meters",
    "valkey_scripts",
    "valkey_line",
    "valkey_meters",
    "billing",
    "transactions",
    "people",
    "keys",
    "tokens",
    "preconditions",
    "background",
    "context",
    "doors",
    "caching",
    "replay",
    "signatures",
    "contracts",
    "resource",
    "queries",
    "table_resource",
    "registry",
    "framing",
    "rendering",
    "lines",
    "middleware",
    "operations",
    "ports",
    "health",
    "cors",
    "throttle",
    "deadlines",
    "outbox",
    "options",
    "entries",
    "scope",
    "hookspecs",
    "ordering",
    "importing",
    "loader",
    "verbs",
    "reach",
    "dispatch",
    "meter",
    "delivery",
    "port",
    "heads",
    "fronts",
    "front",
    "connections",
    "websocket",
    "wire",
    "held",
    "listener",
    "founding",
    "server",
    "upstream",
    "testing",
    "banner",
    "remote",
    "scaffold",
    "ending",
    "serving",
    "child",
    "reload",
    "words",
    "target",
    "workers",
    "cli",
    "__main__",
    "__init__",
)
PUBLIC_MODULES = {"harperpy", "harperpy.streaming", "harperpy.testing", "harperpy.upstream"}
SOCKETS = (
    "harperpy.connections",
    "harperpy.websocket",
    "harperpy.wire",
    "harperpy.upstream",
    "harperpy.testing",
    "harperpy.remote",
    "harperpy.plugins.openai_session",
)
SQL_CALLS = {"execute", "executemany", "executescript", "exec_driver_sql", "text"}
LONGEST_FUNCTION = 60
LONGEST_FILE = 400

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "harperpy": ROOT / "harperpy",
    "harperpy.resources": ROOT / "resources",
    "harperpy.plugins": ROOT / "plugins",
}
FILES = {
    ".".join((name, *path.relative_to(folder).with_suffix("").parts)): path
    for name, folder in ROOMS.items()
    for path in sorted(folder.rglob("*.py"))
}


def nodes(module: str) -> Iterator[ast.AST]:
    """Everything that stands in a module's file."""
    return ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8")))


def imports(module: str) -> Iterator[tuple[int, str, str]]:
    """What a file imports: how many dots it goes up, the module's full name, and the name taken."""
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            yield from ((node.level, source, alias.name) for alias in node.names)


def inside(name: str, *packages: str) -> bool:
    """Whether a module is one of these packages or stands in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def core_file(source: str, name: str) -> str:
    """The core's file that an import reaches; the face is `__init__`."""
    if source == "harperpy":
        return name if name in ORDER else "__init__"
    return source.split(".")[1]


def allowed(module: str, level: int, source: str, name: str) -> bool:
    """Whether a file of `resources` or `plugins` may import this part of harperpy."""
    room = "harperpy.resources" if inside(module, "harperpy.resources") else "harperpy.plugins"
    if inside(source, room):
        return level > 0
    if inside(source, "harperpy.resources"):
        return True
    return level == 0 and source in PUBLIC_MODULES and (source, name) != ("harperpy", "")


def in_root_folder(module: str) -> bool:
    """Whether a file stands in `resources/` or `plugins/`."""
    return inside(module, "harperpy.resources", "harperpy.plugins")


def called(call: ast.Call) -> str:
    """The last part of a called name."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def has_glue(call: ast.Call) -> bool:
    """Whether a call's statement, its first argument or a named one, is put together from text."""
    statement = [*call.args[:1], *(keyword.value for keyword in call.keywords)]
    return any(is_glue(part) for argument in statement for part in ast.walk(argument))


def is_glue(node: ast.AST) -> bool:
    """Whether this makes text from values: an f-string, `format`, `%` or `+` on a string."""
    match node:
        case ast.JoinedStr():
            return True
        case ast.Call(func=ast.Attribute(attr="format" | "format_map")):
            return True
        case ast.BinOp(left=left, op=ast.Mod() | ast.Add(), right=right):
            return any(
                isinstance(side, ast.Constant) and isinstance(side.value, str)
                for side in (left, right)
            )
        case _:
            return False


def test_every_file_of_the_core_has_its_place() -> None:
    """The core is flat, and its files are those of the order."""
    found = {name.removeprefix("harperpy.") for name in FILES if not in_root_folder(name)}

    assert set(ORDER) == found
    assert len(ORDER) == len(set(ORDER))
    assert not {"resources", "plugins"} & found


@pytest.mark.parametrize("module", [name for name in FILES if not in_root_folder(name)])
def test_a_core_file_imports_only_files_above_it(module: str) -> None:
    """Reading order, layers and freedom from cycles are one rule."""
    own = module.removeprefix("harperpy.")
    above = set(ORDER[: ORDER.index(own)]) if own in ORDER else set()
    reached = {
        core_file(source, name) for _, source, name in imports(module) if inside(source, "harperpy")
    }

    assert reached <= above


@pytest.mark.parametrize("module", [name for name in FILES if in_root_folder(name)])
def test_resources_and_plugins_use_the_face(module: str) -> None:
    """What ships is written as a stranger would: from the face, and neighbours relatively."""
    private = [
        f"{source}: {name}"
        for level, source, name in imports(module)
        if inside(source, "harperpy") and not allowed(module, level, source, name)
    ]

    assert private == []
    assert {name for _, source, name in imports(module) if source == "harperpy"} <= set(
        harperpy.__all__
    )


@pytest.mark.parametrize("module", FILES)
def test_aiohttp_stays_at_the_edge(module: str) -> None:
    """Only the files that hold a socket know the transport."""
    known = {source.partition(".")[0] for level, source, _ in imports(module) if not level}

    assert "aiohttp" not in known or inside(module, *SOCKETS)


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_stay_small(module: str) -> None:
    """What outgrows its file or its sixty lines is to be taken apart."""
    long = [
        f"{node.name}: {length}"
        for node in nodes(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    lines = FILES[module].read_text(encoding="utf-8").count("\n")

    assert long == []
    assert lines <= LONGEST_FILE


@pytest.mark.parametrize("module", FILES)
def test_sql_is_never_put_together_from_text(module: str) -> None:
    """Values reach a statement as parameters."""
    glued = [
        ast.unparse(call)
        for call in nodes(module)
        if isinstance(call, ast.Call) and called(call) in SQL_CALLS and has_glue(call)
    ]

    assert glued == []


@pytest.mark.parametrize(
    ("code", "glued"),
    [
        ('execute(f"delete from {table}")', True),
        ('db.execute(text("delete from {}".format(table)))', True),
        ('cursor.executemany("delete from %s" % table, rows)', True),
        ('text(text="delete from " + table)', True),
        ('execute("attach ? as other", (f"{path}?mode=ro",))', False),
        ("execute(select(table.c.id).where(table.c.id == value))", False),
    ],
)
def test_glue_is_recognised(code: str, *, glued: bool) -> None:
    """The ways in which a statement could be put together are seen; a parameter is none."""
    call = ast.parse(code, mode="eval").body

    assert isinstance(call, ast.Call)
    assert called(call) in SQL_CALLS
    assert has_glue(call) is glued


def test_the_face_is_sorted_and_whole() -> None:
    """The list names what the face has, and everything listed is there."""
    public = {
        name
        for name, value in vars(harperpy).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }

    assert sorted(set(harperpy.__all__)) == list(harperpy.__all__)
    assert public == {name for name in harperpy.__all__ if not name.startswith("_")}
    assert [name for name in harperpy.__all__ if not hasattr(harperpy, name)] == []


def test_no_name_of_the_face_is_also_a_file() -> None:
    """`from harperpy import x` can mean one thing only."""
    assert set() == set(harperpy.__all__) & {*ORDER, "resources", "plugins"}


def test_importing_the_face_is_light() -> None:
    """What only some commands need is imported when they need it."""
    code = "import harperpy, sys; print(*{'openai', 'rich', 'sqlglot'} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)

    assert b"" == done.stdout.strip()


def test_one_version_everywhere() -> None:
    """pyproject.toml, the changelog and the installed package agree."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line for line in changelog.splitlines() if line.startswith("## ["))

    assert project["version"] == metadata.version("harperpy")
    assert newest.startswith(f"## [{project['version']}]")

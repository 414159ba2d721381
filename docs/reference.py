"""Writes reference.md, and the table of operations.md, from the source's own words: `make docs`."""

import ast
import asyncio
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args, get_origin

import click
import msgspec
from click.testing import CliRunner

import harperpy
from harperpy import leaves
from harperpy.cli import main
from harperpy.testing import running

PAGE = Path(__file__).with_name("reference.md")
OPERATIONS_PAGE = Path(__file__).with_name("operations.md")
SOURCE = Path(harperpy.__file__).parent

# Heading, names of the face, and what else is met there: `module.Name`, and what it is called.
GROUPS: dict[str, tuple[str, ...]] = {
    "Resources": (
        "Resource",
        "METHOD_VERBS",
        "Contract",
        "RequestTarget",
        "permission.Verb",
        "Resources",
        "Entry",
    ),
    "Requests and answers": (
        *("Request", "Body", "Response", "ResponseError", "Blob", "EventStream", "SSE"),
        *("ReplayBuffer", "json_response", "decode_json", "Problem", "FieldError"),
        *("encode_sse", "SSEDecoder", "Part", "Parts", "ContentType", "ContentTypes"),
    ),
    "Tables": ("TableResource", "Tables", "Table", "has_part", "bounded"),
    "Context": (
        "get_context",
        "Context",
        "accounting.Caller",
        "Transaction",
        "AbortSignal",
        "AbortController",
        "Deadlines",
        "Outbox",
        "Waits",
    ),
    "Users": (
        *("User", "Role", "Permission", "Grants", "TableRights", "permission.AttributeRights"),
        *("read_permission", "document_of", "extract_tenant_id", "Authenticator", "Credential"),
        *("Bearer", "Basic", "Verified", "PermissionErrors", "caller_address"),
    ),
    "Models and backends": (
        *(
            "Models",
            "messages.GenerateInput",
            "GenerateOpts",
            "messages.ResponseFormat",
            "messages.FinishReason",
            "routing.Kind",
            "EmbedOpts",
            "GenerateResult",
            "Choice",
            "GenerateChunk",
            "Batched",
            "Texts",
        ),
        *("EmbedInput", "EmbedResult", "Vector", "base64_of", "TokenUsage", "ModelInfo"),
        "define_backend",
        *("ModelBackend", "Capability", "BackendFactory", "ModelEntry", "ModelCall", "Ledger"),
        *("CallRow", "row_of", "Admission", "Attempt"),
        *("Journal", "Waiting", "JournalReader", "JournalStep", "Booking"),
        *("recount_days", "difference", "Difference", "Served", "Unequal"),
        *("openai_stream", "openai_error", "openai_usage", "openai_finish_reason"),
        *("openai_logprobs", "openai_tool_call", "completion_id", "estimate_tokens"),
    ),
    "Messages": (
        *("Prompt", "Message", "ContentPart", "TextPart", "ImagePart", "ImageURL", "AudioPart"),
        *("InputAudio", "FilePart", "InputFile", "RefusalPart", "ToolDef", "ToolCall"),
        *("ToolCallDelta", "ToolType", "JSONSchemaFormat", "TokenLogprob", "TopLogprob", "paired"),
    ),
    "Plugins": (
        *("Scope", "scope.PluginResources", "ports.PluginServer", "Options", "FileEntry"),
        *("scope.Secrets", "Secret", "mask", "Operations", "NoParameters", "Middleware", "Next"),
        *("Reply", "Database", "Analytics", "auth.Authenticators", "hookimpl", "Config"),
        *("ModelConfig", "LimitConfig", "BudgetConfig", "Billing", "load_config", "redacted"),
        *("Server", "Deed", "closest", "nearest"),
    ),
    "Errors": (
        *("HarperError", "ClientError", "InvalidBody", "InvalidCredentials", "AccessViolation"),
        *(
            "NotAuthorised",
            "NotFound",
            "ModelNotFound",
            "Conflict",
            "PreconditionFailed",
            "CapabilityError",
            "LimitReached",
            "PriceUnknown",
            "UpstreamRejected",
        ),
        *("ServerError", "NotImplementedYet", "ServiceUnavailable", "ModelUnavailable"),
        *("TransactionError", "BackendError", "BackendTimeout", "UpstreamAuthError", "Aborted"),
        *("SetupError", "ConfigError", "ResourceConflict", "RegistrationError"),
    ),
    "Testing": (
        *("testing.running", "testing.RunningServer", "testing.harper_server"),
        *(
            "testing.harper_client",
            "testing.harper_config",
            "testing.harper_environ",
            "testing.with_echo",
            "testing.ECHO",
            "upstream.scripted_upstream",
            "upstream.ScriptedUpstream",
        ),
        *(
            "upstream.ServedRequest",
            "upstream.Answer",
            "upstream.chunk",
            "upstream.streamed",
            "upstream.whole",
        ),
    ),
}
INTRO = {
    "Plugins": (
        "A plugin is a module with one of the hooks. What it may require of others stands beside "
        "them: `requires = ['users']`."
    ),
    "Testing": (
        "`from harperpy.testing import ...`, and the two fixtures with `-p harperpy.testing`: "
        "[testing a plugin](howto/testing.md)."
    ),
}
# What the server makes and hands over: how it is made is not the reader's affair.
HANDED = {
    *("Scope", "Context", "Request", "RequestTarget", "Body", "Models", "Ledger", "Operations"),
    *("Options", "Reply", "Database", "Transaction", "Entry", "Resources", "Secrets"),
    *(
        "Caller",
        "PluginResources",
        "PluginServer",
        "Authenticators",
        "Billing",
        "RunningServer",
        "ScriptedUpstream",
    ),
}
# What only the server calls.
OURS = {
    *("Context.begin", "Context.settle", "Context.abort", "Transaction.settle"),
    *("Scope.close", "Scope.first_error"),
    *("PluginServer.close", "Models.open", "Models.close", "Ledger.record", "Ledger.next_id"),
    *("Ledger.begin", "Journal.close", "Journal.begin", "Journal.end"),
    *("Operations.freeze", "Operations.call", "Authenticators.identify", "ScriptedUpstream.handle"),
    *(
        "Database.open",
        "Billing.open",
        "Billing.of",
        "Database.close",
        "Database.occupy",
        "Reply.close",
        "Resources.freeze",
    ),
    *("Resources.fail", "AbortSignal.guard"),
}
HEAD = """\
# Reference

Every name of `from harperpy import ...`, the hooks, the keys of config.yaml and the commands, in
the words of the source: `make docs` writes this page, and a test holds it to them. To learn, begin
with [the tutorial](tutorial.md).

"""

CONFIG = """\
`config.yaml`, all keys optional. `${NAME}` in a value is taken from the environment, and a start
without it is refused; `$${` is a literal `${`. A key that does not exist is refused, and the
nearest one named. Where no default stands, what the section says holds.

"""
OPERATIONS = """\
Their parameters, and who may run them: [all operations](operations.md#all-operations).
"""
TABLE = ("| key | expected | default |", "| --- | --- | --- |")
TITLES = (*GROUPS, "Configuration", "Operations", "Commands")


@cache
def tree(module: str) -> ast.Module:
    """A module of harperpy, parsed."""
    return ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))


@cache
def homes() -> dict[str, str]:
    """The module that each name of the face comes from."""
    imports = [node for node in tree("__init__").body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def lines(module: str, first: int, last: int) -> str:
    """Lines of a module's source, without the linter's remarks."""
    source = (SOURCE / f"{module}.py").read_text(encoding="utf-8").splitlines()
    text = dedent("\n".join(source[first - 1 : last]))
    return re.sub(r"  # (?:noqa|pyright|fmt|type):.*$", "", text, flags=re.MULTILINE)


def head(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """A definition up to its colon."""
    return lines(module, node.lineno, node.body[0].lineno - 1).rstrip().removesuffix(":")


def name_of(node: ast.stmt) -> str:
    """What a statement defines or assigns, if anything."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
            return name
        case _:
            return ""


def told(body: list[ast.stmt], at: int) -> str:
    """The string that stands below an assignment."""
    match body[at + 1 : at + 2]:
        case [ast.Expr(value=ast.Constant(value=str(text)))]:
            return text
        case _:
            return ""


def sentence(text: str | None) -> str:
    """A docstring on one line, for a list."""
    return " ".join((text or "").split())


def entry(name: str) -> Iterator[str]:
    """One name: its definition, what it says of itself, and its members."""
    module, _, name = name.rpartition(".")
    module = module or homes()[name]
    body = tree(module).body
    at = next(at for at, node in enumerate(body) if name_of(node) == name)
    node = body[at]
    yield from ("", f"### {name}", "")
    match node:
        case ast.ClassDef():
            yield from class_entry(module, node)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            decorators = [f"@{ast.unparse(one)}" for one in node.decorator_list]
            words = ast.get_docstring(node) or ""
            yield from ("```python", *decorators, head(module, node), "```", "", words)
        case _:
            source = lines(module, node.lineno, node.end_lineno or 0)
            yield from ("```python", source, "```", "", told(body, at))


def class_entry(module: str, node: ast.ClassDef) -> Iterator[str]:
    """A class: its fields as code, then what has words of its own as a list."""
    fields, members = [head(module, node) + ":"], list[str]()
    for at, one in enumerate(node.body):
        name = name_of(one)
        if (name.startswith("_") and name != "__init__") or f"{node.name}.{name}" in OURS:
            continue
        if isinstance(one, ast.AnnAssign | ast.Assign) and name:
            source = lines(module, one.lineno, one.end_lineno or 0)
            words = sentence(told(node.body, at))
            if words:
                members.append(f"- `{sentence(source)}`: {words}")
            else:
                fields.extend(f"    {line}" for line in source.split("\n"))
        elif name == "__init__" and node.name not in HANDED and isinstance(one, ast.FunctionDef):
            fields.extend([""] if fields[1:] else [])
            fields.extend(f"    {line}" for line in f"{head(module, one)}: ...".split("\n"))
        elif isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and name != "__init__":
            members.append(member(module, one))
    fields = fields if fields[1:] else [fields[0] + " ..."]
    yield from ("```python", *fields, "```", "", ast.get_docstring(node) or "")
    if members:
        yield from ("", *members)


def member(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A method or a property as an item of a list."""
    text = re.sub(r"^(async )?def ", r"\1", sentence(head(module, node)))
    text = text.replace("( ", "(").replace(", )", ")").replace(" )", ")")
    text = re.sub(r"\((?:self|cls)(?:, )?", "(", text)
    if any(isinstance(one, ast.Name) and one.id == "property" for one in node.decorator_list):
        text = text.replace("() -> ", ": ")
    return f"- `{text}`: {sentence(ast.get_docstring(node))}"


def hooks() -> Iterator[str]:
    """The hooks, as their specifications word them."""
    for node in tree("hookspecs").body:
        if isinstance(node, ast.FunctionDef) and node.name in harperpy.hookspecs.HOOKS:
            yield from ("", f"### {node.name}", "", "```python", head("hookspecs", node), "```", "")
            yield ast.get_docstring(node) or ""


def section(kind: type[Any], prefix: str) -> Iterator[str]:
    """A block of config.yaml in its own words, and a table of its keys."""
    yield from ("", f"### {prefix}", "", sentence(kind.__doc__), "", *TABLE)
    yield from keys(kind, f"{prefix}.")


def keys(kind: type[Any], prefix: str) -> Iterator[str]:
    """The keys of a block and of those within it, as rows."""
    for field in msgspec.structs.fields(kind):
        key = prefix + field.encode_name
        if kind_of := section_in(field.type):
            listed = get_origin(field.type) is tuple
            yield from keys(kind_of, f"{key}[]." if listed else f"{key}.")
        else:
            yield f"| `{key}` | {expected(field.type)} | {default(field)} |"


def section_in(hint: Any) -> type[Any] | None:
    """The section that a key holds, may hold, or holds a list of."""
    for one in (hint, *get_args(hint)):
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            return one
    return None


def expected(hint: Any) -> str:
    """What a type says is expected of a value."""
    if get_origin(hint) is tuple:
        return f"a list of: {expected(get_args(hint)[0])}"
    for one in (hint, *get_args(hint)):
        for meta in getattr(one, "__metadata__", ()):
            return meta.description
    return ""


def default(field: msgspec.structs.FieldInfo) -> str:
    """What holds where config.yaml has no such key, with a unit where one is understood."""
    value = field.default
    if field.required:
        return "*required*"
    if value is None or value == ():
        return ""
    if isinstance(value, int) and "duration" in (words := expected(field.type)):
        units = leaves._TIME_UNITS  # noqa: SLF001  # one list of units, whoever shows it
        unit, size = max(
            ((unit, size) for unit, size in units.items() if unit and value % size == 0),
            key=lambda one: one[1],
        )
        return f"`{value // size}{unit}`" if words and value else "`0`"
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{msgspec.json.encode(plain).decode()}`"


def configuration() -> Iterator[str]:
    """All of config.yaml."""
    yield from (CONFIG, "", *TABLE)
    for field in msgspec.structs.fields(harperpy.Config):
        if get_origin(field.type) is tuple or not section_in(field.type):
            hint = get_args(field.type)[1] if get_origin(field.type) is Mapping else field.type
            name = ".NAME" if hint is not field.type else ""
            words = "a list of maps" if section_in(hint) else expected(hint)
            yield f"| `{field.encode_name}{name}` | {words} | |"
    for field in msgspec.structs.fields(harperpy.Config):
        if field.encode_name == "models":
            yield from section(harperpy.ModelConfig, "models.KIND.NAME")
        elif get_origin(field.type) is tuple:
            yield from section(get_args(field.type)[0], f"{field.encode_name}[]")
        elif kind := section_in(field.type):
            yield from section(kind, field.encode_name)


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What `--help` says of a command and of those beneath it."""
    done = CliRunner().invoke(main, [*path, "--help"], prog_name="harperpy", terminal_width=100)
    title = " ".join(("harperpy", *path))
    yield from ("", f"### {title}", "", "```text", done.output.rstrip(), "```")
    if isinstance(command, click.Group):
        for name in command.commands:
            yield from commands(command.commands[name], (*path, name))


async def operations() -> list[str]:
    """What the operations port takes, as a server has it."""
    rows = ["| operation | | parameters | who may |", "| --- | --- | --- | --- |"]
    async with running() as server:
        for one in sorted(server.server.core.operations, key=lambda one: one.name):
            kind = one.request_type
            words = "" if kind is harperpy.NoParameters else sentence(kind.__doc__)
            given = ". ".join(part for part in (parameters(kind), words) if part)
            who = one.open_to.replace("_", " ")
            group = ", `read_only`" if one.reads and one.open_to == "user" else ""
            told = sentence(one.function.__doc__)
            rows.append(f"| `{one.name}` | {told} | {given} | {who}{group} |")
    return rows


def parameters(kind: type[Any]) -> str:
    """The parameters of an operation, with the older names that count as well."""
    if hasattr(kind, "rest"):
        return ""
    older: Mapping[str, str] = getattr(kind, "synonyms", {})
    shown: list[str] = []
    for field in msgspec.structs.fields(kind):
        name = field.encode_name
        names = [f"`{one}`" for one in (name, *(old for old in older if older[old] == name))]
        shown.append(" or ".join(names) + ("" if field.required else "?"))
    return ", ".join(shown)


def operations_page() -> str:
    """The page of operations: what is written by hand, and the table of them all."""
    written = OPERATIONS_PAGE.read_text(encoding="utf-8").partition("| operation |")[0]
    return written + "\n".join(asyncio.run(operations())) + "\n"


def page() -> str:
    """The whole page."""
    parts = [HEAD, "", *(f"- [{title}](#{slug(title)})" for title in TITLES)]
    for title, names in GROUPS.items():
        parts += ["", f"## {title}", *(["", INTRO[title]] if title in INTRO else [])]
        parts += hooks() if title == "Plugins" else ()
        for name in names:
            parts += entry(name)
    parts += [
        "",
        "## Configuration",
        "",
        *configuration(),
        "",
        "## Operations",
        "",
        OPERATIONS,
        "",
        "## Commands",
        *commands(main),
    ]
    text = "\n".join(part.rstrip() for part in parts)
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def slug(title: str) -> str:
    """A heading's anchor."""
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    OPERATIONS_PAGE.write_text(operations_page(), encoding="utf-8")

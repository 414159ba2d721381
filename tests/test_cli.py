"""The command `harperpy`, run as people run it: in a process of its own."""

import asyncio
import signal
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from importlib import metadata
from pathlib import Path

import aiohttp
import pytest

from asking import exchange
from commands import (
    ADMIN,
    ECHO,
    FIRST,
    FREE,
    SECONDS,
    SECRETS,
    Serving,
    closed,
    configured,
    execute,
    get,
    harperpy,
    names,
    refusal,
    rows,
    said,
    serving,
    slowed,
    started,
    streaming,
    until,
)
from harperpy.ending import HARD_STOP
from harperpy.scaffold import TEMPLATES
from helpers import basic, events


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a config.yaml that takes free ports and models that echo."""
    return configured(tmp_path / "project")


# What a stranger reads

HELP: dict[str, list[str]] = {
    "": ["harperpy init demo", "harperpy dev demo", "init", "dev", "run", "check", "user", "sql"],
    "dev": [
        "this machine only",
        "DIR holds config.yaml",
        "--no-reload",
        "http.port (9926)",
        "--root",
        "$HARPERPY_ROOT",
        ".harperpy",
    ],
    "run": ["all interfaces", "HDB_ADMIN_USERNAME", "HDB_ADMIN_PASSWORD", "--root"],
    "init": ["new project", "NAME", "--template", "[default: resource]", *TEMPLATES.values()],
    "check": ["without serving", "DIR"],
    "version": ["version"],
    "user": ["add", "list", "drop", "harperpy alter_user"],
    "user add": ["--role", "model_user", "--tenant", "--password", "Asked for", "--url", "--dir"],
    "user list": ["--dir", "--root", "--url", "--api-key"],
    "user drop": ["USERNAME", "keys and tokens"],
    "key": ["add", "list", "drop"],
    "key add": ["NAME", "--user", "shown this once"],
    "key list": ["first letters"],
    "key drop": ["ID", "at once"],
    "commands": ["plugins add", "key=value", "--url", "--dir"],
    "sql": ["SELECT", "system.hdb_model_calls", "--url", "--api-key"],
}


@pytest.mark.parametrize("command", HELP)
async def test_help_says_what_a_stranger_needs(tmp_path: Path, command: str) -> None:
    """Each command explains itself, its arguments and its options."""
    done = await harperpy(tmp_path, *command.split(), "--help")

    assert (0, "") == (done.code, done.err)
    words = " ".join(done.out.split())
    assert [] == [word for word in HELP[command] if word not in words]


async def test_version(tmp_path: Path) -> None:
    """It is the installed one, asked for by the command or the option."""
    assert metadata.version("harperpy") == str(await said(tmp_path, "version"))
    assert metadata.version("harperpy") == str(await said(tmp_path, "--version"))


async def test_the_module_is_the_command(tmp_path: Path) -> None:
    """For who has no `harperpy` on the path."""
    done = await execute(tmp_path, sys.executable, "-m", "harperpy", "version")

    assert (0, f"{metadata.version('harperpy')}\n") == (done.code, done.out)


async def test_a_misspelt_command_is_refused(tmp_path: Path) -> None:
    """With the exit code of a wrong usage."""
    assert 2 == (await harperpy(tmp_path, "chekc")).code
    assert 2 == (await harperpy(tmp_path, "dev", "no-such-folder")).code


# A new project


async def test_a_new_project_is_short_and_passes_its_own_tests(tmp_path: Path) -> None:
    """`init` writes less than eighty lines of code, which `check` and pytest accept as they are."""
    told = await said(tmp_path, "init", "demo")
    demo = tmp_path / "demo"
    code = (file for file in demo.rglob("*") if file.suffix in (".py", ".yaml", ".ini"))
    texts = [file.read_text() for file in code]

    assert "Wrote demo. Next: harperpy dev demo" == told
    assert sum(len(text.splitlines()) for text in texts) < 80
    assert "config.yaml and all plugins are fine." == await said(tmp_path, "check", "demo")
    tested = await execute(demo, sys.executable, "-m", "pytest", "-q")
    assert 0 == tested.code, tested
    assert "3 passed" in tested.out


async def test_a_project_imports_its_own_modules(tmp_path: Path) -> None:
    """In `resources.py` and plugins, whether served, checked, tested or asked."""
    await said(tmp_path, "init", "demo")
    demo = tmp_path / "demo"
    (demo / "words.py").write_text("HELLO = 'hello'\n")
    resources = demo / "resources.py"
    resources.write_text(f"from words import HELLO\n{resources.read_text()}")
    plugin = demo / "plugins" / "shout.py"
    plugin.write_text(f"from words import HELLO\n{plugin.read_text()}")
    config = demo / "config.yaml"
    config.write_text(FREE + config.read_text())

    await said(tmp_path, "check", "demo")
    assert 0 == (await execute(demo, sys.executable, "-m", "pytest", "-q")).code
    assert [] == await said(tmp_path, "user", "list", "--dir", "demo")
    async with serving(tmp_path, "dev", "demo") as server:
        assert (200, {"status": "ok"}) == await get(f"{server.url}/health")
        assert (200, {"hello": "Ada"}) == await get(f"{server.url}/Greeting?name=Ada")


async def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    """Those that there are are named, and nothing is written."""
    done = await harperpy(tmp_path, "init", "demo", "--template", "rug")

    assert 2 == done.code
    assert [] == [name for name in TEMPLATES if f"'{name}'" not in done.err]
    assert [] == names(tmp_path)


async def test_init_overwrites_nothing(tmp_path: Path) -> None:
    """A folder that holds anything is refused and left alone; an empty one is taken."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()

    assert "full exists and is not empty" == await refusal(tmp_path, "init", "full")
    assert "file exists and is not empty" == await refusal(tmp_path, "init", "file")
    below = await refusal(tmp_path, "init", "file/demo")
    assert "cannot write into file/demo: Not a directory" == below
    assert ["notes.txt"] == names(tmp_path / "full")
    assert "Wrote empty. Next: harperpy dev empty" == await said(tmp_path, "init", "empty")


async def test_init_takes_a_repository_and_an_environment(tmp_path: Path) -> None:
    """What people have before a project; its own `.gitignore` would be overwritten."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".gitignore").write_text("mine")

    assert ". exists and is not empty" == await refusal(tmp_path, "init", ".")
    (tmp_path / ".gitignore").unlink()
    assert "Wrote .. Next: harperpy dev ." == await said(tmp_path, "init", ".")
    assert {".git", ".venv", ".gitignore", "config.yaml"} <= set(names(tmp_path))


# check


async def test_check_leaves_no_trace(project: Path) -> None:
    """A good project is fine, and neither its data folder nor its database is touched."""
    url = f"database: {{url: 'sqlite:///{project}/kept.db'}}\n"
    (project / "config.yaml").write_text(FREE + ECHO + url)

    assert "config.yaml and all plugins are fine." == await said(project, "check")
    assert ["config.yaml"] == names(project)


async def test_check_does_not_disturb_a_running_server(project: Path) -> None:
    """It passes beside it."""
    async with serving(project):
        assert "config.yaml and all plugins are fine." == await said(project, "check")


async def test_check_says_that_there_is_no_config(tmp_path: Path) -> None:
    """In a wrong folder nobody believes that the project's file is fine."""
    told = await said(tmp_path, "check")
    assert "There is no config.yaml: the defaults and all plugins are fine." == told

    (tmp_path / "config.yml").write_text(ECHO)
    told = await refusal(tmp_path, "check")
    assert "config.yml: it would not be read: its name has to be config.yaml" == told


WRONG: dict[str, tuple[str, list[str]]] = {
    "missing variable": (
        'models: {generative: {default: {backend: openai, apiKey: "${NO_SUCH_KEY}"}}}',
        ["config.yaml: models.generative.default.apiKey", "NO_SUCH_KEY is not set"],
    ),
    "unknown key": ("htpp: {port: 1}", ["config.yaml: htpp: unknown key", "did you mean 'http'?"]),
    "bad value": ("http: {port: many}", ["config.yaml: http.port", "between 0 and 65535"]),
    "no YAML": ("http: {port: 1", ["config.yaml: line ", "not valid YAML"]),
    "unknown kind": (
        "models: {generative: {default: {backend: ecoh}}}",
        ["models.generative.default.backend", "did you mean 'echo'?"],
    ),
    "misspelt plugin": ("plugins: {opnai: true}", ["plugin opnai", "did you mean 'openai'?"]),
    "failing plugin": (
        "plugins: {bad: {path: bad.py}}",
        ["plugin bad does not start: ValueError: no good"],
    ),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
async def test_check_says_what_is_wrong(tmp_path: Path, text: str, words: list[str]) -> None:
    """It fails and names file, key, variable or plugin, on one line."""
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "bad.py").write_text("raise ValueError('no good')")

    done = await harperpy(tmp_path, "check")

    assert (1, "") == (done.code, done.out)
    (line,) = done.err.splitlines()
    assert [] == [word for word in words if word not in line]


async def test_only_lines_of_the_project_are_named(project: Path, tmp_path: Path) -> None:
    """Where what failed is not of the project, no line of Python's own is named in its place."""
    (tmp_path / "elsewhere.py").write_text("raise ValueError('no good')")
    config = f"{FREE}{ECHO}plugins: {{bad: {{package: elsewhere}}}}\n"
    (project / "config.yaml").write_text(config)

    done = await harperpy(project, "check", PYTHONPATH=str(tmp_path))

    assert (1, "plugin bad does not start: ValueError: no good\n") == (done.code, done.err)


@pytest.mark.parametrize("command", ["dev", "run"])
async def test_a_missing_variable_stops_the_start(tmp_path: Path, command: str) -> None:
    """Nothing is served with an empty key."""
    (tmp_path / "config.yaml").write_text(WRONG["missing variable"][0])

    told = await refusal(tmp_path, command, **ADMIN)

    assert "models.generative.default.apiKey" in told
    assert "NO_SUCH_KEY is not set" in told
    assert ["config.yaml"] == names(tmp_path)


# The first start


async def test_run_needs_an_administrator(project: Path) -> None:
    """Without one it refuses and says what to set; half of the two is refused as well."""
    assert (await refusal(project, "run")).startswith(FIRST)
    for command in ("run", "dev"):
        for name, value in ADMIN.items():
            told = await refusal(project, command, **{name: value})
            assert "set HDB_ADMIN_USERNAME and HDB_ADMIN_PASSWORD both, or neither" == told


@pytest.mark.parametrize("command", ["run", "dev"])
async def test_the_named_administrator_is_made_once(project: Path, command: str) -> None:
    """No secret is printed; the name is in, now and after a start that names nobody."""
    async with serving(project, command, environ=ADMIN) as server:
        assert SECRETS.search(server.printed) is None
        credential = basic(*ADMIN.values())
        assert 200 == (await get(f"{server.url}/v1/models", credential))[0]
    async with serving(project, command) as server:
        assert SECRETS.search(server.printed) is None
        assert 200 == (await get(f"{server.url}/v1/models", credential))[0]
        assert ["root"] == [user["username"] for user in await said(project, "user", "list")]
    assert SECRETS.search((project / "log").read_text()) is None


async def test_the_banner_of_a_first_start_works_as_printed(project: Path) -> None:
    """Password, key, curl line and snippet, copied as they stand, are answered."""
    async with serving(project) as server:
        _, _, printed = server.printed.partition("Try it:\n\n")
        curl, snippet, _ = printed.split("\n\n", 2)
        password = server.found(r"password +(\S+)")

        for credential in (f"Bearer {server.key}", basic("HDB_ADMIN", password)):
            assert 200 == (await get(f"{server.url}/v1/models", credential))[0]
        for command in (("bash", "-c", curl), (sys.executable, "-c", snippet)):
            done = await execute(project, *command)
            assert 0 == done.code, done
            assert "Say hello." in done.out

    log = (project / "log").read_text()
    assert server.key not in log
    assert password not in log


async def test_a_second_start_prints_no_secret(project: Path) -> None:
    """The key of the first one still works."""
    async with serving(project) as first:
        pass
    async with serving(project) as second:
        assert SECRETS.search(second.printed) is None
        assert 200 == (await get(f"{second.url}/v1/models", f"Bearer {first.key}"))[0]


async def test_a_first_start_that_fails_keeps_the_secrets_for_the_next(project: Path) -> None:
    """Nobody saw them, so they are made by the start that succeeds."""
    text = (project / "config.yaml").read_text()
    async with serving(configured(project.parent / "other")) as other:
        port = other.url.rpartition(":")[2]
        (project / "config.yaml").write_text(text.replace("port: 0", f"port: {port}", 1))
        told = await refusal(project, "dev")
    (project / "config.yaml").write_text(text)

    assert f"cannot listen on 127.0.0.1:{port} (http.port): the port is in use" == told
    async with serving(project) as server:
        assert 200 == (await get(f"{server.url}/v1/models", f"Bearer {server.key}"))[0]


async def test_a_first_start_that_is_stopped_keeps_the_secrets_for_the_next(project: Path) -> None:
    """Until all that takes long is done nobody is made whose key nobody has seen."""
    (project / "resources.py").write_text(
        "import asyncio\n\nfrom harperpy import ModelBackend\n\n\n"
        "class Slow(ModelBackend):\n    name = 'slow'\n\n    async def open(self):\n"
        "        print('opening', flush=True)\n        await asyncio.Event().wait()\n\n"
        "    def generate(self, prompt, opts):\n        return ''\n\n\n"
        "def handle_application(scope):\n"
        "    scope.models.register_backend('generative', 'slow', Slow())\n"
    )
    async with started(project, "dev") as process:
        await until(process, "opening")
        process.terminate()
        async with asyncio.timeout(SECONDS):
            assert 0 == await process.wait()
    (project / "resources.py").unlink()

    async with serving(project) as server:
        assert 200 == (await get(f"{server.url}/v1/models", f"Bearer {server.key}"))[0]


# Where it is served, and to whom


async def test_the_printed_urls_are_real(project: Path) -> None:
    """With port 0 as well, by name and by both addresses of this machine where it has them."""
    async with serving(project) as server:
        assert server.url == server.found(r"Ready on (\S+)")
        assert f"{server.url}/v1" == server.found(r"OpenAI +(\S+)")
        for url in (server.url, server.operations_url):
            assert (200, {"status": "ok"}) == await get(f"{url}/health")


async def test_a_host_is_printed_as_it_is_served(tmp_path: Path) -> None:
    """Who serves one address only is told that address."""
    text = (
        "http: {port: 0, host: 127.0.0.1}\noperationsApi: {network: {port: 0, host: 127.0.0.1}}\n"
    )
    (tmp_path / "config.yaml").write_text(text + ECHO)
    async with serving(tmp_path) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.operations_url.startswith("http://127.0.0.1:")
        assert f'base_url="{server.url}/v1"' in server.printed


async def test_the_banner_shows_what_is_there(project: Path) -> None:
    """Mounts with their verbs and who may call them, models, and plugins that failed."""
    (project / "config.yaml").write_text(f"{FREE}{ECHO}plugins: {{gone: {{path: gone.py}}}}\n")
    (project / "resources.py").write_text(
        "from harperpy import Resource\n\n\nclass Open(Resource):\n    public = True\n\n"
        "    @staticmethod\n    def get():\n        return 1\n"
    )
    async with serving(project) as server:
        words = " ".join(server.printed.split())

    for expected in (
        "/Open Open GET anyone",
        "/v1/chat/completions V1ChatCompletions POST roles that grant it",
        "default generative echo",
        "Plugins that did not start gone: ",
    ):
        assert expected in words


async def test_the_data_folder_is_the_owners_alone(project: Path) -> None:
    """Whatever the umask: the folder is 0700, the socket and all files are 0600."""
    async with serving(project, umask=0):
        root = project / ".harperpy"
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in root.iterdir()}

        assert 0o700 == stat.S_IMODE(root.stat().st_mode)
        assert (root / "operations.sock").is_socket()
        assert {"operations.sock", "secret.key", "system.db"} <= set(modes)
        assert {0o600} == set(modes.values())
    assert not (root / "operations.sock").exists()


@pytest.mark.parametrize("how", ["option", "variable", "config"])
async def test_the_data_folder_may_be_elsewhere(project: Path, how: str) -> None:
    """`--root`, $HARPERPY_ROOT or rootPath name it, for serving and for asking."""
    root = project.parent / "data"
    option = ["--root", str(root)] if how == "option" else []
    environ = {"HARPERPY_ROOT": str(root)} if how == "variable" else {}
    if how == "config":
        (project / "config.yaml").write_text(f"{FREE}{ECHO}rootPath: {root}\n")
    async with serving(project, "dev", *option, environ=environ):
        assert (
            "HDB_ADMIN" == (await said(project, "user", "list", *option, **environ))[0]["username"]
        )
    assert (root / "system.db").is_file()
    assert not (project / ".harperpy").exists()


async def test_one_data_folder_is_one_servers(project: Path) -> None:
    """A second start is refused in one sentence and does not disturb the first."""
    async with serving(project) as first:
        told = await refusal(project, "dev")

        pid = first.process.pid
        assert f"another harperpy (process {pid}) already uses the data folder .harperpy" == told
        assert 200 == (await get(f"{first.url}/v1/models", f"Bearer {first.key}"))[0]
        assert "HDB_ADMIN" == (await said(project, "user", "list"))[0]["username"]


@pytest.mark.parametrize("command", ["dev", "run"])
async def test_a_start_waits_for_a_command_that_has_the_folder(project: Path, command: str) -> None:
    """What the command does on the database is soon over; no server stays away for it."""
    waits = "from pathlib import Path\nprint('held', flush=True)\nwhile not Path('go').exists():\n"
    (project / "resources.py").write_text(f"import time\n{waits}    time.sleep(0.01)\n")
    lock = project / ".harperpy" / "harperpy.lock"
    async with started(project, "user", "list") as asked:
        await until(asked, "held")
        async with started(project, command, environ=ADMIN) as process:
            async with asyncio.timeout(SECONDS):
                while lock not in opened(process.pid):  # noqa: ASYNC110  # nobody tells of it
                    await asyncio.sleep(0.01)
            (project / "go").touch()
            assert 0 == await asked.wait()
            assert 0 == await Serving(process, await until(process, "Ready on")).end()


def opened(pid: int) -> set[Path]:
    """The files that a process has open; none where it is no more."""
    with suppress(OSError):
        return {file.readlink() for file in Path(f"/proc/{pid}/fd").iterdir()}
    return set()


# Operations


async def operate(folder: Path, *where: str) -> None:
    """Users, keys and SQL, from the first to the last."""
    added = await said(folder, "user", "add", "ada", "--tenant", "acme", "--password", "pw", *where)
    assert "ada successfully added" == added
    listed = {user["username"]: user for user in await said(folder, "user", "list", *where)}
    assert ("acme", "model_user") == (listed["ada"]["tenant"], listed["ada"]["role"]["id"])

    made = await said(folder, "key", "add", "laptop", "--user", "ada", *where)
    assert {"id", "name", "api_key"} == set(made)
    keys = {key["id"]: key for key in await said(folder, "key", "list", *where)}
    assert ("laptop", "ada") == (keys[made["id"]]["name"], keys[made["id"]]["user"])
    dropped = await said(folder, "key", "drop", made["id"], *where)
    assert f"API key {made['id']} successfully deleted" == dropped
    limits = ("--tenant", "lent", "--expires-in", "30d", "--grants", '{"models": ["gpt-*"]}')
    made = await said(folder, "key", "add", "ci", "--user", "ada", *limits, *where)
    keys = {key["id"]: key for key in await said(folder, "key", "list", *where)}
    ci = keys[made["id"]]
    assert ("lent", ["gpt-*"]) == (ci["tenant"], ci["grants"]["models"])
    assert ci["created"] < ci["expires"]
    wrong = await refusal(folder, "key", "add", "ci", "--grants", "gpt", *where)
    assert "grants" in wrong

    select = "SELECT username FROM system.hdb_user WHERE tenant = 'acme'"
    assert [{"username": "ada"}] == await said(folder, "sql", select, *where)
    assert "ada successfully deleted" == await said(folder, "user", "drop", "ada", *where)
    assert "drop_user: User ada does not exist" == await refusal(
        folder, "user", "drop", "ada", *where
    )
    assert "allowed" in await refusal(folder, "sql", "DELETE FROM hdb_user", *where)


async def test_operations_reach_a_running_server_by_its_socket(project: Path) -> None:
    """In the project's folder no credential is needed; keys are the first super user's."""
    async with serving(project) as server:
        await operate(project)
        made = await said(project, "key", "add", "mine")
        assert 200 == (await get(f"{server.url}/v1/models", f"Bearer {made['api_key']}"))[0]
        await said(project, "key", "drop", made["id"])
        assert 401 == (await get(f"{server.url}/v1/models", f"Bearer {made['api_key']}"))[0]


async def test_operations_work_on_the_database_where_no_server_runs(project: Path) -> None:
    """Before the first start too; what they did is there at the next."""
    assert [] == await said(project, "user", "list")
    await operate(project)
    await said(project, "user", "add", "eve", "--role", "super_user", "--password", "pw")
    made = await said(project, "key", "add", "ci", "--user", "eve")
    async with serving(project, "run") as server:
        assert SECRETS.search(server.printed) is None
        assert 200 == (await get(f"{server.url}/v1/models", f"Bearer {made['api_key']}"))[0]


async def test_operations_reach_another_machine_by_url(project: Path, tmp_path: Path) -> None:
    """With a key, as an option or in the environment; refusals come back as they were worded."""
    async with serving(project) as server:
        where = ("--url", server.operations_url)
        await operate(tmp_path, *where, "--api-key", server.key)
        users = await said(tmp_path, "user", "list", *where, HARPERPY_API_KEY=server.key)
        assert ["HDB_ADMIN"] == [user["username"] for user in users]

        told = await refusal(tmp_path, "user", "list", *where)
        assert "list_users: No credential was sent: must log in." == told
        told = await refusal(tmp_path, "user", "list", *where, "--api-key", "hk_wrong")
        assert "list_users: Incorrect API key provided." == told
        told = await refusal(tmp_path, "user", "list", "--url", server.url, "--api-key", server.key)
        assert told
    told = await refusal(tmp_path, "user", "list", *where)
    assert told.startswith(f"list_users: no harperpy answers at {server.operations_url}: ")
    told = await refusal(tmp_path, "user", "list", "--url", "http://root:hunter2@127.0.0.1:1")
    assert told.startswith("list_users: no harperpy answers at http://")
    assert "hunter2" not in told
    assert ["project"] == names(tmp_path)


async def test_a_password_is_asked_for(project: Path) -> None:
    """Twice, and it is shown nowhere."""
    done = await harperpy(project, "user", "add", "ada", stdin="hunter2\nhunter2\n")

    assert 0 == done.code, done
    assert "ada successfully added" in done.out
    assert "hunter2" not in done.out + done.err


async def test_operations_reach_a_server_that_knows_more_variables(tmp_path: Path) -> None:
    """The shell that asks need not have what the running server's config.yaml names."""
    config = 'models: {generative: {default: {backend: openai, model: m, apiKey: "${SOME_KEY}"}}}\n'
    (tmp_path / "config.yaml").write_text(FREE + config)
    async with serving(tmp_path, environ={"SOME_KEY": "made-up"}):
        assert "HDB_ADMIN" == (await said(tmp_path, "user", "list"))[0]["username"]
    assert "SOME_KEY is not set" in await refusal(tmp_path, "user", "list")


# The end


@pytest.fixture
def slow(project: Path) -> Path:
    """A project with a model that waits to be told to go on."""
    return slowed(project)


@pytest.mark.parametrize("streams", ["true", "false"])
async def test_the_log_is_on_stderr_unless_that_is_off(tmp_path: Path, streams: str) -> None:
    """`logging.stdStreams: false` leaves the terminal to the banner."""
    logging = f"logging: {{level: debug, stdStreams: {streams}}}\n"
    folder = configured(tmp_path / "project", logging)
    async with serving(folder) as server:
        assert 404 == (await get(f"{server.url}/nothing"))[0]
    assert ("404 NotFound" in (folder / "log").read_text()) == (streams == "true")


async def test_no_key_is_logged_whoevers_error_it_stands_in(project: Path) -> None:
    """The trace of an unforeseen error is whole but for what a provider's key looks like."""
    (project / "resources.py").write_text(
        "from harperpy import Resource\n\n\nclass Broken(Resource):\n    public = True\n\n"
        "    @staticmethod\n    def get():\n"
        '        raise KeyError("sk-made-up-for-this-test", "Bearer made-up-too", "plain")\n'
    )
    async with serving(project) as server:
        status, told = await get(f"{server.url}/Broken")
    log = (project / "log").read_text()
    assert 500 == status
    assert "made-up" not in f"{log}{told}"
    assert "KeyError: ('[redacted]', 'Bearer [redacted]', 'plain')" in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_lets_a_stream_end(slow: Path, number: int) -> None:
    """It takes no more requests, finishes the one that runs, writes its row, and exits 0."""
    async with serving(slow) as server, streaming(server) as response:
        server.process.send_signal(number)
        await closed(server.url)
        (slow / "go").touch()
        async with asyncio.timeout(SECONDS):
            *_, last = events(await response.text())
            code = await server.process.wait()

    assert (0, "[DONE]") == (code, last)
    assert [{"model": "slow", "success": True, "error_code": None, "finish_reason": None}] == (
        await rows(slow)
    )


@pytest.mark.slow
async def test_sigterm_ends_a_stream_that_does_not_end(slow: Path) -> None:
    """After the drain limit it is cut off; the exit is still good, and the row is there."""
    async with serving(slow) as server, streaming(server) as response:
        code = await server.end()
        with suppress(aiohttp.ClientError):
            assert "[DONE]" not in await response.text()

    assert 0 == code
    (row,) = await rows(slow)
    assert ("slow", False) == (row["model"], row["success"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_without_a_trace(project: Path, number: int) -> None:
    """Ctrl-C and SIGTERM alike."""
    async with serving(project) as server:
        assert 0 == await server.end(number)

    assert "Traceback" not in (project / "log").read_text()


@pytest.mark.parametrize("command", ["dev", "run"])
async def test_started_by_nohup_it_outlives_its_terminal(project: Path, command: str) -> None:
    """The signal of a terminal that is closed is then no order to end."""
    async with serving(project, command, environ=ADMIN, within=("nohup",)) as server:
        server.process.send_signal(signal.SIGHUP)

        assert 200 == (await get(f"{server.url}/health"))[0]
        assert 200 == (await get(f"{server.url}/health"))[0]


async def test_a_signal_ends_a_start_that_hangs(project: Path) -> None:
    """Nobody has to wait for a plugin's time limit; the next start may have the folder."""
    hanging = """
import asyncio

async def handle_application(scope):
    print("hanging", flush=True)
    await asyncio.Event().wait()
"""
    (project / "resources.py").write_text(hanging)
    async with started(project, "dev") as process:
        await until(process, "hanging")
        process.terminate()
        async with asyncio.timeout(SECONDS):
            assert 0 == await process.wait()
    (project / "resources.py").unlink()
    async with serving(project) as server:
        assert server.key


BUSY = """
import asyncio
import time

from harperpy import Resource


class Busy(Resource):
    public = True

    @staticmethod
    def get():
        print("busy", flush=True)
        while True:
            time.sleep(0.01)


class Threads(Resource):
    public = True

    @staticmethod
    async def get():
        print("busy", flush=True)
        await asyncio.to_thread(Busy.get)
"""


@asynccontextmanager
async def busy(project: Path, path: str, *arguments: str) -> AsyncIterator[Serving]:
    """A server one of whose requests never ends, whatever it is told."""
    (project / "resources.py").write_text(BUSY)
    async with started(project, *arguments, environ=ADMIN) as process:
        server = Serving(process, await until(process, "Ready on"))
        asked = asyncio.create_task(exchange(f"{server.url}/{path}"))
        await until(process, "busy")
        yield server
        await asyncio.wait((asked,))
        asked.exception()


@pytest.mark.parametrize("arguments", [("dev",), ("dev", "--no-reload"), ("run",)])
async def test_a_second_ctrl_c_ends_a_server_that_hears_nothing(
    project: Path, arguments: Sequence[str]
) -> None:
    """Also where the project's own code keeps the loop busy; the exit code says so."""
    async with busy(project, "Busy", *arguments) as server:
        assert HARD_STOP == await server.interrupt()

    assert "cut off" in (project / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["Busy", "Threads"])
@pytest.mark.parametrize("command", ["dev", "run"])
async def test_what_does_not_end_in_time_is_cut_off(project: Path, command: str, path: str) -> None:
    """Whatever does not let a server end, be it its loop or a thread."""
    async with busy(project, path, command) as server:
        await server.end()

    assert "cut off" in (project / "log").read_text()


async def test_a_killed_server_is_no_obstacle(project: Path) -> None:
    """Its socket and lock stay behind; commands and the next start work, and no row is lost."""
    async with serving(project) as server:
        body = {"messages": [{"role": "user", "content": "hello"}]}
        headers = {"Authorization": f"Bearer {server.key}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{server.url}/v1/chat/completions", json=body) as response,
        ):
            assert 200 == response.status
        await said(project, "sql", "SELECT count(*) FROM hdb_model_calls")
        assert -signal.SIGKILL == await server.end(signal.SIGKILL)

    assert (project / ".harperpy" / "operations.sock").is_socket()
    assert ["default"] == [row["model"] for row in await rows(project)]
    assert -signal.SIGKILL == server.process.returncode
    async with serving(project) as again:
        assert SECRETS.search(again.printed) is None
        assert 200 == (await get(f"{again.url}/v1/models", f"Bearer {server.key}"))[0]
        assert ["default"] == [row["model"] for row in await rows(project)]


async def test_a_data_folder_that_cannot_be_used(project: Path) -> None:
    """One sentence names it."""
    (project / "file").write_text("")

    assert "file" in await refusal(project, "dev", "--root", "file")

    root = project / "data"
    root.mkdir()
    (root / "system.db").write_text("this is no database, however long it may be " * 100)
    assert "system.db" in await refusal(project, "dev", "--root", "data")
    (root / "harperpy.lock").unlink()
    (root / "harperpy.lock").mkdir()
    for command in ("dev", "run"):
        assert "cannot use data/harperpy.lock: " in await refusal(
            project, command, "--root", "data"
        )


async def test_a_newer_database_is_left_alone(project: Path) -> None:
    """What a later version made is refused, not changed."""
    async with serving(project):
        pass
    with closing(sqlite3.connect(project / ".harperpy" / "system.db")) as connection:
        connection.execute("PRAGMA user_version = 99")

    assert "newer" in await refusal(project, "dev")
    with closing(sqlite3.connect(project / ".harperpy" / "system.db")) as connection:
        assert (99,) == connection.execute("PRAGMA user_version").fetchone()

"""`GET /`: a list of what is served, where nothing else answers there."""

from importlib import metadata

from harperpy import Resource
from harperpy.testing import running
from helpers import ask


class Hello(Resource):
    """Open to all who read."""

    public = {"read"}  # noqa: RUF012
    sub_paths = True

    @staticmethod
    def get() -> str:
        """A greeting."""
        return "hello"

    @staticmethod
    def post() -> None:
        """Nothing."""


class Secret(Hello):
    """Not for the list."""

    hidden = True


async def test_each_caller_is_told_what_is_open_to_them() -> None:
    """Strangers read the name, users what their role opens, super users all that is not hidden."""
    async with running(resources={"hello": Hello, "secret": Secret}) as server:
        stranger = await ask(server, "GET", "/", key="")
        user = await ask(server, "GET", "/", key=await server.key_for("ada"))
        root = await ask(server, "GET", "/")
        head = await ask(server, "HEAD", "", key="")
        posted = await ask(server, "POST", "/")
        unknown = await ask(server, "GET", "/nothing", key="")
    assert {"name": "harperpy"} == stranger.json
    assert {
        "name": "harperpy",
        "version": metadata.version("harperpy"),
    }.items() <= user.json.items()
    assert ["GET"] == user.json["resources"]["/hello"]
    assert ["POST"] == user.json["resources"]["/v1/chat/completions"]
    assert ["GET", "POST"] == root.json["resources"]["/hello"]
    assert {"/", "/secret", "/openapi"}.isdisjoint(root.json["resources"])
    assert [200, 405, 404] == [head.status, posted.status, unknown.status]


async def test_whoever_else_is_mounted_at_the_root_answers_there() -> None:
    """The list gives way without a word."""
    async with running(resources={"": Hello}) as server:
        answer = await ask(server, "GET", "/", key="")
        health = await ask(server, "GET", "/health", key="")
    assert "hello" == answer.json
    assert {"status": "ok"} == health.json


async def test_the_list_can_be_off() -> None:
    """`plugins: {listing: false}` leaves the root empty."""
    async with running("plugins: {listing: false}") as server:
        assert 404 == (await ask(server, "GET", "/")).status

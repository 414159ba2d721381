"""What a class may say of itself, and what a wrong word in it is told when it is mounted."""

from typing import Any

import pytest

from harperpy import RegistrationError, RequestTarget, Resource, Resources
from harperpy.testing import running
from helpers import ask

METHODS = {
    "GET": "read",
    "HEAD": "read",
    "QUERY": "read",
    "POST": "create",
    "PUT": "update",
    "PATCH": "update",
    "DELETE": "delete",
}


def done() -> str:
    """A verb."""
    return "done"


def all_verbs(**attributes: Any) -> type[Resource]:
    """A class that answers every method."""
    verbs = dict.fromkeys(("get", "post", "put", "patch", "delete", "query"), staticmethod(done))
    return type("Verbs", (Resource,), {**verbs, **attributes})


# --- who may without a login

PUBLIC: dict[str, tuple[Any, set[str]]] = {
    "nothing said": ((), set()),
    "False": (False, set()),
    "True": (True, {"read", "create", "update", "delete"}),
    "one permission": ({"read"}, {"read"}),
    "a list": (["create", "update"], {"create", "update"}),
    "all four by name": (set(METHODS.values()), {"read", "create", "update", "delete"}),
}


@pytest.mark.parametrize(("public", "opened"), PUBLIC.values(), ids=PUBLIC)
async def test_public_opens_what_it_says_and_nothing_else(public: Any, opened: set[str]) -> None:
    """It is True, False or a set of permissions; what it leaves out is 401."""
    expected = {method: 200 if verb in opened else 401 for method, verb in METHODS.items()}

    async with running(resources={"it": all_verbs(public=public)}) as server:
        found = {method: (await ask(server, method, "/it", key="")).status for method in METHODS}

    assert expected == found


WRONG: dict[str, tuple[Any, str]] = {
    "a word alone": ("read", "got 'read'; did you mean {'read'}?"),
    "a word that holds another": ("already", "got 'already'; did you mean {'read'}?"),
    "misspelt": ({"raed"}, "got 'raed'; did you mean 'read'?"),
    "a verb, not a permission": (["post"], "got 'post'"),
    "nothing": (None, "got None"),
    "a number": (1, "got 1"),
    "a list within": ([["read"]], "got ['read']"),
}


@pytest.mark.parametrize(("public", "told"), WRONG.values(), ids=WRONG)
def test_another_word_than_a_permission_is_refused_when_mounted(public: Any, told: str) -> None:
    """A class that says who may in words that nobody knows opens nothing by accident."""
    with pytest.raises(RegistrationError) as refusal:
        Resources().set("it", all_verbs(public=public))

    expected = "Verbs.public: expected a set of create, delete, read, update, "
    assert str(refusal.value).startswith(expected)
    assert told in str(refusal.value)


# --- what is a verb


@pytest.mark.parametrize("verb", ["get", "post", "put", "patch", "delete", "query"])
async def test_none_takes_an_inherited_verb_away(verb: str) -> None:
    """`post = None` is as if it had never been defined: 405, and not in `Allow`."""
    methods = {"GET", "HEAD"} if verb == "get" else {verb.upper()}

    async with running(resources={"it": all_verbs(**{verb: None})}) as server:
        found = {method: (await ask(server, method, "/it")).status for method in METHODS}
        allowed = (await ask(server, "OPTIONS", "/it")).headers["Allow"].split(", ")

    assert {method: 405 if method in methods else 200 for method in METHODS} == found
    assert {*METHODS, "OPTIONS"} - methods == set(allowed)


def takes_a_name(*, target: Any) -> str:
    """Takes its parameter by name only."""
    return str(target)


def takes_four(one: Any, two: Any, three: Any, four: Any) -> str:
    """Takes more than anything is given."""
    return str((one, two, three, four))


NO_VERBS: dict[str, tuple[str, Any, str]] = {
    "a number": ("get", 5, ": expected a function, got 5"),
    "a word": ("post", "create", ": expected a function, got 'create'"),
    "by name": (
        "get",
        staticmethod(takes_a_name),
        " takes what it is not given: it is given (target, context), by position",
    ),
    "a verb with a body by name": (
        "query",
        staticmethod(takes_a_name),
        " takes what it is not given: it is given (target, data, context), by position",
    ),
    "too many": (
        "put",
        staticmethod(takes_four),
        " takes what it is not given: it is given (target, data, context), by position",
    ),
    "a hook that is none": ("allow_read", None, ": expected a function, got None"),
    "a hook by name": (
        "allow_update",
        staticmethod(takes_a_name),
        " takes what it is not given: it is given (user, target, context), by position",
    ),
    "a hook that takes too many": (
        "allow_delete",
        staticmethod(takes_four),
        " takes what it is not given: it is given (user, target, context), by position",
    ),
}


@pytest.mark.parametrize(("name", "value", "told"), NO_VERBS.values(), ids=NO_VERBS)
def test_what_could_never_be_called_is_refused_when_mounted(
    name: str, value: Any, told: str
) -> None:
    """A verb or a hook that would fail at every call is found before the first."""
    with pytest.raises(RegistrationError) as refusal:
        Resources().set("it", type("Odd", (Resource,), {name: value}))

    assert f"Odd.{name}{told}" == str(refusal.value)


async def test_parameters_with_a_value_of_their_own_keep_it() -> None:
    """What a verb takes beyond its arguments, by place or by name, is its own affair."""

    def get(target: Any, context: Any, extra: int = 4, *, more: int = 5) -> list[int]:
        del target, context
        return [extra, more]

    async with running(resources={"it": all_verbs(get=staticmethod(get))}) as server:
        assert [4, 5] == (await ask(server, "GET", "/it")).json


class Shelf(Resource):
    """A mount that knows its things, and how to look for them."""

    public = {"read"}  # noqa: RUF012
    sub_paths = True

    @staticmethod
    def get(target: RequestTarget) -> dict[str, str | None]:
        """One of them, or the shelf."""
        return {"got": target.id}

    @staticmethod
    def search(target: RequestTarget) -> list[str]:
        """Those that are looked for."""
        return [target.search]


class Search(Resource):
    """A mount that can only be searched."""

    @staticmethod
    def search(target: RequestTarget) -> list[str]:
        """What is looked for."""
        return [target.search]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/shelf", {"got": None}),
        ("/shelf/7", {"got": "7"}),
        ("/shelf/7?a=b", {"got": "7"}),
        ("/shelf/", [""]),
        ("/shelf?a=b", ["a=b"]),
        ("/shelf/?a=b", ["a=b"]),
        ("/shelf/7/", [""]),
        ("/search", [""]),
        ("/search?a=b", ["a=b"]),
    ],
)
async def test_a_collection_is_searched_where_a_class_knows_how(path: str, told: Any) -> None:
    """`search` answers a GET for a collection in place of `get`, with the permission to read."""
    async with running(resources={"shelf": Shelf, "search": Search}) as server:
        answer = await ask(server, "GET", path)
        head = await ask(server, "HEAD", path)
        stranger = await ask(server, "GET", path, key="")
        allowed = (await ask(server, "OPTIONS", path)).headers["Allow"]
    assert (200, told) == (answer.status, answer.json)
    assert 200 == head.status
    assert (200 if path.startswith("/shelf") else 401) == stranger.status
    assert "GET, HEAD, OPTIONS" == allowed

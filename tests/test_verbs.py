"""What a class may say of itself, and what a wrong word in it is told when it is mounted."""

from typing import Any

import pytest

from harperpy import RegistrationError, Resource, Resources
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
    "a word alone": ("read", "got 'read'; did you mean 'read'?"),
    "a word that holds another": ("already", "got 'already'; did you mean 'read'?"),
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

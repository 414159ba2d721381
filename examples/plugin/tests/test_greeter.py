import pytest

from harperpy import InvalidBody
from harperpy.testing import ECHO, running


async def test_it_greets_in_the_word_of_the_config(harper_client):
    answer = await harper_client.get("/greeting?name=Ada")
    assert await answer.json() == {"moin": "Ada"}


async def test_everyone_is_greeted(harper_server):
    async with harper_server.session("") as nobody, nobody.get("/greeting") as answer:
        assert await answer.json() == {"moin": "world"}


async def test_a_super_user_changes_the_word(harper_server, harper_client):
    told = await harper_server.operate("set_greeting_word", word="salut")
    assert told == {"message": "The word is salut"}
    answer = await harper_client.get("/greeting?name=Ada")
    assert await answer.json() == {"salut": "Ada"}


async def test_an_empty_word_is_refused(harper_server):
    with pytest.raises(InvalidBody, match="word: Expected `str` of length >= 1"):
        await harper_server.operate("set_greeting_word", word="")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("wrod: moin", "plugins.greeter.wrod: unknown key; did you mean 'word'?"),
        ("word: [moin]", "plugins.greeter.word: Expected `str`, got `array`"),
    ],
)
async def test_wrong_options_are_told(pytestconfig, options, told):
    config = f"{ECHO}\nplugins: {{greeter: {{path: src/harperpy_greeter, {options}}}}}"
    async with running(config, directory=pytestconfig.rootpath) as server:
        health = await server.operate("get_status")
    assert told in health["plugins"]["greeter"]["error"]

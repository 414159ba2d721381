"""Greetings, in the word that config.yaml or a super user chooses."""

from typing import Annotated

import msgspec

from harperpy import RequestTarget, Resource, Scope

requires = ["operations_api"]  # where its operation is called

Word = Annotated[str, msgspec.Meta(min_length=1, max_length=40)]


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """The plugin's block of config.yaml. A misspelt key is told the nearest right one."""

    word: Word = "hello"


class Who(msgspec.Struct):
    """Who is greeted."""

    name: str = "world"


class SetWord(msgspec.Struct, forbid_unknown_fields=True):
    """What the operation takes."""

    word: Word


def handle_application(scope: Scope) -> None:
    """Mount the resource, and let super users change its word until the server stops."""
    word = scope.options.decode(Options).word

    class Greeting(Resource):
        """Greets."""

        public = {"read"}

        @staticmethod
        def get(target: RequestTarget[Who]) -> dict[str, str]:
            """Greet whoever the query names."""
            return {word: target.query.name}

    def set_word(request: SetWord) -> dict[str, str]:
        nonlocal word
        word = request.word
        return {"message": f"The word is {word}"}

    scope.resources.set("greeting", Greeting)
    scope.operations.add("set_greeting_word", set_word, SetWord)

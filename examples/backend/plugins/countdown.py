"""A model made of a generator: it counts down from the number it is told."""

import re
from collections.abc import AsyncIterator

import msgspec

from harperpy import (
    ClientError,
    GenerateChunk,
    GenerateOpts,
    Prompt,
    Scope,
    TokenUsage,
    define_backend,
    estimate_tokens,
)


class Options(msgspec.Struct, forbid_unknown_fields=True):
    most: int = 1000


def handle_application(scope: Scope) -> None:
    most = scope.options.decode(Options).most

    async def answer(prompt: Prompt, opts: GenerateOpts) -> AsyncIterator[str | GenerateChunk]:
        start = first_number(prompt.text, most)
        told = min(start, opts.max_tokens or start)
        for number in range(start, start - told, -1):
            yield f"{number} "
        asked = sum(estimate_tokens(message.text) for message in prompt.messages)
        yield GenerateChunk(
            finish_reason="stop" if told == start else "length",
            usage=TokenUsage(prompt_tokens=asked, completion_tokens=told),
        )

    scope.models.register_backend(
        "generative", "countdown", define_backend("countdown", generate_stream=answer)
    )


def first_number(text: str, most: int) -> int:
    found = re.search(r"\d+", text)
    if found is None:
        message = "say a number to count down from"
        raise ClientError(message, param="messages", code="no_number")
    if len(found[0]) > len(str(most)) or int(found[0]) > most:
        message = f"expected a number of at most {most}"
        raise ClientError(message, param="messages", code="number_too_large")
    return int(found[0])

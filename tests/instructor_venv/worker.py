"""Runs instructor in a venv of its own: a line of JSON tells what to do, the next what came."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import instructor
import openai
from instructor.core import InstructorRetryException
from pydantic import BaseModel


class Sum(BaseModel):
    """An addition."""

    a: int
    b: int


class Worker:
    """Clients of one gateway."""

    def __init__(self, base_url: str, api_key: str) -> None:
        access: dict[str, Any] = {"base_url": base_url, "api_key": api_key, "max_retries": 0}
        self.plain = openai.OpenAI(**access)
        self.later = openai.AsyncOpenAI(**access)

    async def create(self, mode: str, *, later: bool = False, **options: Any) -> Any:
        """A sum, with the usage it cost."""
        if later:
            asked = instructor.from_openai(self.later, mode=instructor.Mode[mode]).chat.completions
            found, answer = await asked.create_with_completion(response_model=Sum, **options)
        else:
            client = instructor.from_openai(self.plain, mode=instructor.Mode[mode])
            asked = client.chat.completions
            found, answer = asked.create_with_completion(response_model=Sum, **options)
        return {"sum": found.model_dump(), "tokens": answer.usage.total_tokens}

    async def text(self, **options: Any) -> Any:
        """A text: no type is asked for."""
        client = instructor.from_openai(self.plain)
        answer = client.chat.completions.create(response_model=None, **options)
        return answer.choices[0].message.content

    async def partial(self, mode: str, **options: Any) -> Any:
        """The states that a sum went through as it came."""
        client = instructor.from_openai(self.plain, mode=instructor.Mode[mode])
        states = client.chat.completions.create_partial(response_model=Sum, **options)
        return [state.model_dump() for state in states]

    async def iterable(self, **options: Any) -> Any:
        """All sums of an answer."""
        client = instructor.from_openai(self.plain)
        found = client.chat.completions.create_iterable(response_model=Sum, **options)
        return [one.model_dump() for one in found]

    async def stream(self, *, leave: bool = False, **options: Any) -> Any:
        """A text as it comes; or only its first words, where the stream is left."""
        client = instructor.from_openai(self.later)
        stream = await client.chat.completions.create(response_model=None, stream=True, **options)
        pieces: list[str] = []
        async for chunk in stream:
            pieces += [choice.delta.content or "" for choice in chunk.choices]
            if leave and pieces[-1]:
                break
        await stream.close()
        return "".join(pieces)

    async def many(self, times: int, model: str) -> Any:
        """Many sums at once."""
        client = instructor.from_openai(self.later)
        found = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model=model,
                    response_model=Sum,
                    messages=[{"role": "user", "content": f"add {at} and 1"}],
                )
                for at in range(times)
            )
        )
        return [one.a for one in found]


def told(error: BaseException) -> dict[str, Any]:
    """What is known of an error; of what a retried call gave up on, the last one."""
    while isinstance(error, InstructorRetryException) and error.__cause__ is not None:
        error = error.__cause__
        error = getattr(error, "last_attempt", error)
        if not isinstance(error, BaseException):
            error = error.exception()
    status, code = getattr(error, "status_code", None), getattr(error, "code", None)
    return {"type": type(error).__name__, "status": status, "code": code, "message": str(error)}


def say(message: Any) -> None:
    """One line to whoever listens."""
    sys.stdout.write(f"{json.dumps(message)}\n")
    sys.stdout.flush()


async def main() -> None:
    """Do what each line says, until there are no more."""
    say({"answer": instructor.__version__})
    for line in sys.stdin:
        task = json.loads(line)
        worker = Worker(task.pop("base_url"), task.pop("api_key"))
        try:
            said = {"answer": await getattr(worker, task.pop("do"))(**task)}
        except Exception as error:  # noqa: BLE001  (whatever it is, the test is to know)
            said = {"error": told(error)}
        say(said)
        worker.plain.close()
        await worker.later.close()


asyncio.run(main())

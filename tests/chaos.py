"""What the chaos test is made of: callers who come and go, and a provider that is not well."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import msgspec
import openai

from harperpy.testing import Answer, chunk, streamed, whole

TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLED: Any = {"id": "call_1", "function": {"name": "look", "arguments": "{}"}}
AT_ONCE = 10
KINDS = ("whole", "streamed", "tools", "streamed tools", "embedding")
CALL_ID = "x-harper-call-id"
# Whom the callers are, and how many of a hundred calls each makes.
CALLERS = {"ada": 25, "bob": 20, "cleo": 15, "dave": 40}
# What becomes of a request at the provider, and how many of a hundred.
MOODS = {
    "well": 54,
    "slow": 18,
    "broken": 6,
    "busy": 3,
    "gone": 4,
    "cut": 5,
    "senseless": 3,
    "uncounted": 4,
    "closing": 2,
    "silent": 1,
}


class Provider:
    """What a `ScriptedUpstream` answers by: OpenAI's answers with counted tokens, if it is well.

    Of the model `shaky` it is never well for long, of no model ill once it is `cured`. It keeps
    to `max_tokens`.
    """

    def __init__(self, seed: int) -> None:
        self.cured = False
        self.moods = Counter[str]()
        self._random = random.Random(seed)  # noqa: S311  # no secret

    def __call__(self, path: str, body: Any) -> Answer:
        """The answer to a request."""
        (mood,) = self._random.choices([*MOODS], [*MOODS.values()])
        if body["model"] == "shaky" and self._random.random() < 0.5:
            mood = "broken"
        if self.cured:
            mood = "well"
        self.moods[mood] += 1
        good = self._streamed(body) if body.get("stream") else Answer(body=self._whole(path, body))
        return self._spoilt(good, mood)

    def _whole(self, path: str, body: Any) -> Any:
        if path.endswith("/embeddings"):
            data = [{"object": "embedding", "index": 0, "embedding": [1.0, 0.0]}]
            asked = self._random.randint(1, 9)
            usage = {"prompt_tokens": asked, "total_tokens": asked}
            return {"object": "list", "data": data, "model": "embed", "usage": usage}
        words = self._words(body)
        called = {
            "id": "call_1",
            "type": "function",
            "function": {"name": "look", "arguments": "{}"},
        }
        more = {"tool_calls": [called]} if body.get("tools") else {}
        return {**whole("".join(words), **more), "usage": self._usage(len(words))}

    def _streamed(self, body: Any) -> Answer:
        words = self._words(body)
        events = [*streamed(*words)]
        events[-2] = {"choices": [], "usage": self._usage(len(words))}
        if body.get("tools"):
            events[-4] = chunk({"tool_calls": [{**CALLED, "index": 0}]})
        return Answer(events=events, pause=self._random.uniform(0, 0.01))

    def _words(self, body: Any) -> list[str]:
        return ["word "] * self._random.randint(1, min(12, body.get("max_tokens") or 12))

    def _usage(self, answered: int) -> dict[str, Any]:
        asked = self._random.randint(1, 9)
        total = {"total_tokens": asked + answered}
        return {"prompt_tokens": asked, "completion_tokens": answered, **total}

    def _spoilt(self, good: Answer, mood: str) -> Answer:
        at = self._random.randint(0, 3)
        ill: dict[str, Callable[[], Answer]] = {
            "slow": lambda: _but(good, pause=self._random.uniform(0.02, 0.1)),
            "broken": lambda: Answer(status=self._random.choice((500, 503)), body={}),
            "busy": lambda: Answer(status=429, body={}, headers={"Retry-After": "0"}),
            "gone": lambda: Answer(cut="head"),
            "cut": lambda: _broken_off(good, at, b"", cut=True),
            "senseless": lambda: _broken_off(good, at, b'data: {"cho\n\n', cut=False),
            "uncounted": lambda: _uncounted(good),
            "closing": lambda: _but(good, cut="after"),
            "silent": lambda: Answer(hang="head"),
        }
        return ill[mood]() if mood in ill else good


def _but(good: Answer, **fields: Any) -> Answer:
    return msgspec.structs.replace(good, **fields)


def _broken_off(good: Answer, at: int, end: bytes, *, cut: bool) -> Answer:
    if good.events is not None:
        return Answer(events=[*good.events[:at], end], cut=cut)
    return Answer(body=b'{"id": "chat', cut=cut)


def _uncounted(good: Answer) -> Answer:
    if good.events is not None:
        return _but(good, events=[*good.events[:-2], good.events[-1]])
    return _but(good, body={**good.body, "usage": None})


class Callers:
    """Clients who ask all kinds of things, leave when they like, and remember what they heard.

    `named` are the ids that answers had, `counted` the usage that callers saw of whole ones (what
    was asked and what was answered), `heard` how calls ended for them. They think for `pause`
    seconds at most before each.
    """

    def __init__(self, url: str, keys: dict[str, str], seed: int, pause: float) -> None:
        self.named: list[int] = []
        self.counted: dict[int, tuple[int, int | None]] = {}
        self.heard = Counter[str]()
        self._random = random.Random(seed)  # noqa: S311  # no secret
        self._pause = pause
        self._places = asyncio.Semaphore(AT_ONCE)
        self._ended = asyncio.Condition()
        self._clients = {
            name: openai.AsyncOpenAI(api_key=key, base_url=f"{url}/v1", max_retries=0, timeout=30)
            for name, key in keys.items()
        }

    async def until(self, count: int) -> None:
        """Return when so many calls have ended."""
        async with self._ended:
            await self._ended.wait_for(lambda: self.heard.total() >= count)

    async def call(self) -> None:
        """One call of anyone."""
        async with self._places:
            await asyncio.sleep(self._random.uniform(0, self._pause))
            heard = await self.ask(*self._next())
        async with self._ended:
            self.heard[heard] += 1
            self._ended.notify_all()

    def _next(self) -> tuple[str, str, dict[str, Any], float | None]:
        dice = self._random
        (name,) = dice.choices([*CALLERS], [*CALLERS.values()])
        kind = dice.choice(KINDS)
        model = "embed" if kind == "embedding" else dice.choice(("default", "shaky"))
        body: dict[str, Any] = {"model": model}
        if kind == "embedding":
            body["input"] = "hello " * dice.randint(2, 9)
        else:
            content = "hello " * dice.randint(2, 9)
            body["messages"] = [{"role": "user", "content": content}]
            if dice.random() < 0.9:
                body["max_tokens"] = dice.randint(1, 20)
        if "tools" in kind:
            body["tools"] = [TOOL]
        if "streamed" in kind:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        leaves = dice.uniform(0, 0.15) if dice.random() < 0.25 else None
        return name, kind, body, leaves

    async def ask(
        self, name: str, kind: str, body: dict[str, Any], leaves: float | None = None
    ) -> str:
        """One call of somebody, who leaves after so many seconds; how it ended."""
        client = self._clients[name]
        asks: Callable[..., Any] = self._streamed if "streamed" in kind else self._whole
        try:
            async with asyncio.timeout(leaves):
                await asks(client, body)
        except TimeoutError:
            return "left"
        except openai.APIStatusError as error:
            self._name(error.response.headers)
            return f"{error.status_code} {error.code}"
        except (openai.APIError, httpx2.HTTPError) as error:
            return type(error).__name__
        return kind

    async def _whole(self, client: openai.AsyncOpenAI, body: dict[str, Any]) -> None:
        resource = client.chat.completions if "messages" in body else client.embeddings
        raw = await resource.with_raw_response.create(**body)
        self._count(self._name(raw.headers), raw.parse().usage)

    async def _streamed(self, client: openai.AsyncOpenAI, body: dict[str, Any]) -> None:
        raw = await client.chat.completions.with_raw_response.create(**body)
        number, usage = self._name(raw.headers), None
        async with raw.parse() as stream:
            async for one in stream:
                usage = one.usage or usage
        self._count(number, usage)

    def _name(self, headers: Mapping[str, str]) -> int:
        number = int(headers.get(CALL_ID, 0))
        if number:
            self.named.append(number)
        return number

    def _count(self, number: int, usage: Any) -> None:
        self.counted[number] = (usage.prompt_tokens, getattr(usage, "completion_tokens", None))

    async def close(self) -> None:
        """They are gone."""
        for client in self._clients.values():
            await client.close()

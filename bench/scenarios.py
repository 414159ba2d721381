"""What is asked of a gateway, how often at once, and the figures that harperpy is to reach."""

import json
from collections.abc import Mapping
from typing import NamedTuple

MESSAGES = [
    {
        "role": "system",
        "content": "You are a terse assistant. Answer in one short paragraph. " * 4,
    },
    {
        "role": "user",
        "content": "Explain how a token travels from the model to the client. " * 10,
    },
]


class Scenario(NamedTuple):
    """A load: `inputs` to embed or a chat, and the least ratio of work per CPU-second to a peer."""

    name: str
    connections: int
    model: str = ""
    stream: bool = False
    inputs: int = 0
    wanted: Mapping[str, float] = {}

    @property
    def path(self) -> str:
        """What is asked."""
        if not self.model:
            return "/v1/models"
        return "/v1/embeddings" if self.inputs else "/v1/chat/completions"

    @property
    def unit(self) -> str:
        """What the load is counted in."""
        return "event" if self.stream else "request"

    def body(self) -> bytes:
        """The body of each request; without one it is a GET."""
        if not self.model:
            return b""
        if self.inputs:
            sentences = [f"a sentence to embed number {number}" for number in range(self.inputs)]
            return json.dumps({"model": self.model, "input": sentences}).encode()
        asked = {"model": self.model, "messages": MESSAGES, "temperature": 0.2, "max_tokens": 256}
        more = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        return json.dumps({**asked, "user": "bench", **more}).encode()


SPEED = (
    Scenario("models", 32, wanted={"limit": 0.30, "naive": 5, "nginx": 0.5}),
    Scenario("chat:32", 32, "mock-t64", wanted={"limit": 0.40, "naive": 30, "nginx": 0.25}),
    Scenario(
        "stream:50",
        50,
        "mock-t200",
        stream=True,
        wanted={"limit": 0.80, "naive": 40, "nginx": 0.75},
    ),
    Scenario(
        "stream:500:mock-t40-r20-s",
        500,
        "mock-t40-r20-s",
        stream=True,
        wanted={"limit": 0.50, "naive": 8, "nginx": 0.35},
    ),
    Scenario("embed1", 32, "mock-d1536", inputs=1, wanted={"limit": 0.25, "naive": 22}),
    Scenario("embed100:8", 8, "mock-d1536", inputs=100, wanted={"limit": 0.45, "naive": 3}),
)
MEMORY = ("idle:1000", "slow:1000", "stuck:10")
# What a client adds on its way through the gateway, one stream's event or one call at a time.
PACED = Scenario("latency:50", 50, "mock-t40-r20-s", stream=True)
ONE_CHAT = Scenario("latency:1", 1, "mock-t64")
CHAT = SPEED[1]
STREAM = SPEED[2]
SLOW = Scenario("slow", 1000, "mock-t400-r10", stream=True)
STUCK = Scenario("stuck", 10, "mock-t300000", stream=True)
ALL = (*(scenario.name for scenario in SPEED), *MEMORY, "workers", "ready", "latency")

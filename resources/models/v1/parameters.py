"""What happens to each parameter of OpenAI's requests: the table behind the compatibility page."""

from __future__ import annotations

from typing import Literal

import msgspec

from harperpy import Capability


class Parameter(msgspec.Struct, frozen=True):
    """One parameter.

    `honoured` ones reach the backend; where `needs` names a capability, backends without it
    refuse them with 400 `unsupported_parameter`, save for the `idle` values, which ask for
    nothing. `accepted` ones have no effect on the answer by OpenAI's own contract.
    """

    name: str
    effect: Literal["honoured", "accepted"]
    note: str
    needs: Capability | None = None
    idle: tuple[str, ...] = ()


CHAT = (
    Parameter("messages", "honoured", "Roles and parts: see below."),
    Parameter(
        "model",
        "honoured",
        "A name of `/v1/models`, or one that a pattern of the configuration covers. Absent: "
        "`default`.",
    ),
    Parameter("stream", "honoured", "Backends that only answer whole refuse it.", "stream"),
    Parameter(
        "stream_options",
        "honoured",
        "`include_usage` adds the usage chunk; `include_obfuscation` has no effect. Only with "
        "`stream`.",
    ),
    Parameter("tools", "honoured", "Functions and custom tools, at most 128.", "tools"),
    Parameter(
        "tool_choice",
        "honoured",
        "`none`, `auto`, `required`, one tool, or `allowed_tools`: backends that do not know it "
        "are offered these tools only.",
    ),
    Parameter("parallel_tool_calls", "honoured", "Only with `tools`."),
    Parameter(
        "functions",
        "honoured",
        "The old protocol: offered as tools, and called by `function_call`.",
        "tools",
    ),
    Parameter("function_call", "honoured", "The old `tool_choice`."),
    Parameter(
        "response_format",
        "honoured",
        "`json_object`, or `json_schema` with its own name and `strict`.",
        "structured_output",
        ("text",),
    ),
    Parameter("temperature", "honoured", "0 to 2."),
    Parameter("top_p", "honoured", "0 to 1."),
    Parameter(
        "max_completion_tokens",
        "honoured",
        "At least 1. Sent by the name that the provider knows.",
    ),
    Parameter("max_tokens", "honoured", "The same by its old name; the new one wins."),
    Parameter("stop", "honoured", "A text or up to four."),
    Parameter("seed", "honoured", "64 bits."),
    Parameter("presence_penalty", "honoured", "-2 to 2."),
    Parameter("frequency_penalty", "honoured", "-2 to 2."),
    Parameter("logit_bias", "honoured", "-100 to 100 for each token.", "logit_bias", ("{}",)),
    Parameter(
        "n",
        "honoured",
        "1 to 128. Backends that give one answer at a time are called `n` times, and each call is "
        "billed.",
    ),
    Parameter("logprobs", "honoured", "In every choice.", "logprobs", ("false",)),
    Parameter("top_logprobs", "honoured", "0 to 20. Only with `logprobs`."),
    Parameter(
        "reasoning_effort",
        "honoured",
        "`minimal` to `max`, as far as the provider's model knows them.",
        "reasoning_effort",
        ("none",),
    ),
    Parameter("verbosity", "honoured", "`low` or `high`.", "verbosity", ("medium",)),
    Parameter("modalities", "honoured", "`text`, and `audio` with `audio`.", "audio", ("text",)),
    Parameter("audio", "honoured", "Voice and format of a spoken answer.", "audio"),
    Parameter(
        "prediction",
        "honoured",
        "A hint that only makes answers faster: backends that cannot use it go without.",
    ),
    Parameter(
        "web_search_options",
        "honoured",
        "The provider's own search; its `annotations` come back.",
        "web_search_options",
    ),
    Parameter(
        "moderation", "honoured", "The provider's own; its verdict comes back.", "moderation"
    ),
    Parameter(
        "service_tier",
        "honoured",
        "The tier that served comes back.",
        "service_tier",
        ("auto", "default"),
    ),
    Parameter(
        "store",
        "honoured",
        "Stored at the provider, under its own id.",
        "store",
        ("false",),
    ),
    Parameter("user", "accepted", "A label, passed on to providers."),
    Parameter("safety_identifier", "accepted", "A label, passed on to providers."),
    Parameter("metadata", "accepted", "Up to 16 labels, passed on to providers."),
    Parameter("prompt_cache_key", "accepted", "A caching hint, passed on to providers."),
    Parameter("prompt_cache_options", "accepted", "A caching hint, passed on to providers."),
    Parameter("prompt_cache_retention", "accepted", "A caching hint, passed on to providers."),
)
"""POST /v1/chat/completions."""

PARTS = (
    Parameter("text", "honoured", "In every message."),
    Parameter("refusal", "honoured", "In messages of the assistant."),
    Parameter("image_url", "honoured", "In messages of the user and of tools.", "image_url"),
    Parameter("input_audio", "honoured", "In messages of the user and of tools.", "input_audio"),
    Parameter("file", "honoured", "In messages of the user and of tools.", "file"),
)
"""The parts of a message's content."""

EMBEDDINGS = (
    Parameter(
        "input",
        "honoured",
        "A text, up to 2048 texts, or arrays of token numbers, which are decoded for backends "
        "that want text.",
    ),
    Parameter(
        "model",
        "honoured",
        "A name of `/v1/models`, or one that a pattern of the configuration covers. Absent: "
        "`default`.",
    ),
    Parameter(
        "dimensions", "honoured", "Models that cannot shorten their vectors refuse other sizes."
    ),
    Parameter("encoding_format", "honoured", "`float` or `base64`, whatever the backend gives."),
    Parameter("user", "accepted", "A label, passed on to providers."),
)
"""POST /v1/embeddings."""

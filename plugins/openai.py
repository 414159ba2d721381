"""The `openai` backend: any provider that speaks OpenAI's protocol."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import msgspec

from harperpy import (
    BackendFactory,
    Capability,
    ConfigError,
    EmbedOpts,
    EmbedResult,
    GenerateChunk,
    GenerateOpts,
    GenerateResult,
    ModelBackend,
    ModelConfig,
    ModelEntry,
    Prompt,
)

from .openai_answers import whole_answer
from .openai_embeddings import embedded, passed_on
from .openai_exchange import Timeouts
from .openai_names import MOST_BYTES, Listing, ServedNames
from .openai_protocol import chat_body, encoded
from .openai_transport import Transport

_OPENAI = "https://api.openai.com/v1"
_OPENAI_HOST = "api.openai.com"
# Its regions, and who else serves its models: they know the new name of the limit, and the newest
# of them no other.
_ITS_MODELS = (".api.openai.com", ".openai.azure.com", ".cognitiveservices.azure.com")
# It tells the usage of a stream unasked, and refuses who asks for it.
_UNASKED = ".mistral.ai"
_ENDPOINT = re.compile(r"/(chat/completions|completions|embeddings|responses)/?$")
# The total is the OpenAI clients' own: ten minutes.
_TOTAL_MS, _CONNECT_MS, _FIRST_BYTE_MS, _IDLE_MS = 600_000, 10_000, 60_000, 120_000
_RETRIES = 2
_LISTING = msgspec.json.Decoder(Listing)
# What the provider cannot do of these it says itself.
_FEATURES = frozenset[Capability](
    {
        "custom_tools",
        "n",
        "image_url",
        "input_audio",
        "file",
        "audio",
        "logit_bias",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
        "moderation",
        "service_tier",
        "store",
    }
)
# Servers that speak OpenAI's protocol seldom know it: they get the allowed tools only.
_AT_OPENAI = frozenset[Capability]({*_FEATURES, "allowed_tools"})


def register_model_backends(register: Callable[[str, BackendFactory], None]) -> None:
    """Offer the kind `openai`."""
    register("openai", OpenAI)


class OpenAI(ModelBackend):
    """One entry of `models:` whose provider speaks OpenAI's protocol."""

    name = "openai"
    tools = True
    structured_output = True
    logprobs = True
    token_input = True
    features = _FEATURES

    def __init__(self, entry: ModelEntry) -> None:
        config = entry.settings
        base = config.base_url or _OPENAI
        host = urlsplit(base).hostname or ""
        at_openai = host == _OPENAI_HOST
        if at_openai and config.api_key is None:
            message = f"{entry.where}.apiKey: expected a key for {_OPENAI_HOST} (or a baseUrl)"
            raise ConfigError(message)
        if found := _ENDPOINT.search(base):
            message = f"{entry.where}.baseUrl: expected what comes before {found[0]}"
            raise ConfigError(message)
        if config.api_key and "@" in urlsplit(base).netloc:
            message = f"{entry.where}.baseUrl: expected no user and password beside an apiKey"
            raise ConfigError(message)
        if at_openai:
            self.features = _AT_OPENAI
        self.asks_usage = not host.endswith(_UNASKED)
        renamed = at_openai or host.endswith(_ITS_MODELS)
        self.limit_name = "max_completion_tokens" if renamed else "max_tokens"
        organization = config.organization
        self._transport = Transport(
            base,
            secret=config.api_key.reveal() if config.api_key else None,
            timeouts=timeouts(config),
            headers={"OpenAI-Organization": organization} if organization else None,
            through=config.transport,
        )
        # An entry's name is its model's, unless it stands for many or for none.
        named = not entry.is_general
        self.provider_model = config.model or (entry.name if named else None)
        self.max_retries = _RETRIES if config.max_retries is None else config.max_retries
        # Where one model stands for all, or nothing may be fetched, nobody asks what there is.
        lists = entry.is_pattern and self.provider_model is None and not entry.offline
        self.names = ServedNames(self._listing, entry.where) if lists else None

    def served(self) -> Sequence[str]:
        """What the provider listed last, under a pattern."""
        return self.names.read() if self.names else ()

    async def open(self) -> None:
        """Begin to ask the provider what a pattern stands for."""
        if self.names:
            self.names.open()

    def embed(
        self, inputs: list[str] | list[list[int]], opts: EmbedOpts
    ) -> Coroutine[Any, Any, EmbedResult]:
        """One request for all inputs; that none is missing is the facade's to check."""
        body: dict[str, Any] = {
            **opts.provider_options,
            "model": opts.model,
            "input": inputs,
        }
        # Floats come unasked, and some providers refuse to be asked for them.
        if opts.encoding_format != "float":
            body["encoding_format"] = opts.encoding_format
        if opts.dimensions is not None:
            body["dimensions"] = opts.dimensions
        read = passed_on if opts.encoding_format == "float" else embedded
        return self._transport.whole("/embeddings", encoded(body), read, opts.call_id)

    def generate(self, prompt: Prompt, opts: GenerateOpts) -> Coroutine[Any, Any, GenerateResult]:
        """A whole answer."""
        body = chat_body(prompt, opts, self.limit_name)
        read = whole_answer if opts.n is None else partial(whole_answer, n=opts.n)
        return self._transport.whole("/chat/completions", body, read, opts.call_id)

    def generate_stream(self, prompt: Prompt, opts: GenerateOpts) -> AsyncIterator[GenerateChunk]:
        """An answer as it comes; usage is asked for where it would not come."""
        usage = self.asks_usage
        body = chat_body(prompt, opts, self.limit_name, stream=True, usage=usage)
        return self._transport.chunks("/chat/completions", body, opts.n, opts.call_id)

    async def close(self) -> None:
        """Close the pooled connections."""
        if self.names:
            await self.names.close()
        await self._transport.close()

    async def _listing(self) -> Listing:
        return await self._transport.whole("/models", None, _LISTING.decode, most=MOST_BYTES)


def timeouts(config: ModelConfig) -> Timeouts:
    """An entry's time limits, in seconds."""
    first_byte = config.first_byte_timeout_ms
    return Timeouts(
        total=(config.request_timeout_ms or _TOTAL_MS) / 1000,
        connect=(config.connect_timeout_ms or _CONNECT_MS) / 1000,
        first_byte=first_byte / 1000 if first_byte else None,
        stream_first_byte=(first_byte or _FIRST_BYTE_MS) / 1000,
        idle=(config.idle_timeout_ms or _IDLE_MS) / 1000,
    )

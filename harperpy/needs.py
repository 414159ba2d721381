"""Needs: what a call wants its backend to be able to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import msgspec

from .accounting import Method
from .messages import Capability, EmbedOpts, GenerateOpts, Prompt
from .parts import ContentPart, part_type

# Options that need a capability of their name, and the values that everyone honours.
_IDLE: dict[Capability, tuple[Any, ...]] = {
    "logprobs": (False,),
    "logit_bias": ({},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "audio": (),
}
_NEEDING = GenerateOpts.__struct_fields__.index("response_format")
_NOTHING = (None,) * len(GenerateOpts.__struct_fields__[_NEEDING:])
# What most calls need, and nothing else.
_PLAIN: dict[Method, Mapping[Capability, str]] = {
    "embed": {"embed": "model"},
    "generate": {"generate": "model"},
    "generateStream": {"stream": "stream"},
}
_EVERYONES_PARTS = ("text", "refusal")
# Who lacks these is asked in another way: none is refused for it.
_NEVER_NEEDED = frozenset[Capability]({"n", "allowed_tools"})


def all_needs(method: Method) -> frozenset[Capability]:
    """What calls may need that name nothing by themselves."""
    if method == "embed":
        return frozenset(_PLAIN[method])
    return frozenset(get_args(Capability)) - _NEVER_NEEDED - {"embed"}


def needs_of(
    method: Method, asked: Any, opts: GenerateOpts | EmbedOpts
) -> Mapping[Capability, str]:
    """What a call needs, and the field that asks for it."""
    needs = _PLAIN[method]
    if isinstance(opts, GenerateOpts):
        needs = _with_more(needs, asked, opts)
    return {**dict.fromkeys(opts.requires, "model"), **needs} if opts.requires else needs


def _with_more(
    plain: Mapping[Capability, str], prompt: Prompt, opts: GenerateOpts
) -> Mapping[Capability, str]:
    if not prompt.tools and msgspec.structs.astuple(opts)[_NEEDING:] == _NOTHING:
        for message in prompt.messages:
            if type(message.content) is not str:
                break
        else:
            return plain
    return {**plain, **_more_needed(prompt, opts)}


def _more_needed(prompt: Prompt, opts: GenerateOpts) -> Mapping[Capability, str]:
    """What a call needs because of its tools, options, and parts of messages."""
    needs: dict[Capability, str] = {}
    if prompt.tools and opts.tool_choice != "none":
        kinds = {tool.type for tool in prompt.tools}
        needs |= {"tools": "tools"} if "function" in kinds else {}
        needs |= {"custom_tools": "tools"} if "custom" in kinds else {}
    if opts.response_format not in (None, "text"):
        needs["structured_output"] = "response_format"
    for option, idle in _IDLE.items():
        value = getattr(opts, option)
        if value is not None and value not in idle:
            needs[option] = option
    if opts.modalities and "audio" in opts.modalities:
        needs["audio"] = "modalities"
    for at, message in enumerate(prompt.messages):
        if not isinstance(message.content, str):
            needs |= _parts_needed(message.content, f"messages[{at}].content")
    return needs


def _parts_needed(parts: Sequence[ContentPart], path: str) -> dict[Capability, str]:
    kinds = ((at, part_type(part)) for at, part in enumerate(parts))
    return {
        cast("Capability", kind): f"{path}[{at}].type"
        for at, kind in kinds
        if kind not in _EVERYONES_PARTS
    }

"""ContentPart: a piece of a message, in OpenAI's form: text, an image, sound, a file, a refusal."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec


class _Part(msgspec.Struct, kw_only=True, tag_field="type", omit_defaults=True):
    # Caching hints of OpenAI's and of others behind its protocol: the provider's business.
    prompt_cache_breakpoint: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None


class TextPart(_Part, kw_only=True, tag="text"):
    """Text."""

    text: str


class RefusalPart(_Part, kw_only=True, tag="refusal"):
    """What an assistant said when it refused."""

    refusal: str


class ImageURL(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Where an image is: a URL, or the image itself as a data URL."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Part, kw_only=True, tag="image_url"):
    """An image."""

    image_url: ImageURL


class InputAudio(msgspec.Struct, kw_only=True):
    """Sound in base64."""

    data: str
    format: Literal["wav", "mp3"]


class AudioPart(_Part, kw_only=True, tag="input_audio"):
    """Sound."""

    input_audio: InputAudio


class InputFile(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A file, in base64 or by the provider's own id of it."""

    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None


class FilePart(_Part, kw_only=True, tag="file"):
    """A file."""

    file: InputFile


ContentPart: TypeAlias = TextPart | ImagePart | AudioPart | FilePart | RefusalPart
"""A part of a message, in OpenAI's shape."""


def part_type(part: ContentPart) -> str:
    """OpenAI's name for the kind of part."""
    return str(type(part).__struct_config__.tag)

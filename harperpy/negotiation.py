"""Accept → how a value, or a stream of values, becomes bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .errors import ClientError
from .records import Rows, encode_rows
from .sse import encode_json, encode_sse

JSON = "application/json"
NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"
TEXT = "text/plain"
CSV = "text/csv"
MSGPACK = "application/x-msgpack"

# Quality on our side; the first of equals wins.
_OFFERED = {
    MSGPACK: 0.9,
    "application/msgpack": 0.9,
    JSON: 0.8,
    EVENTS: 0.8,
    "application/problem+json": 0.8,
    NDJSON: 0.7,
    "application/ndjson": 0.7,
    TEXT: 0.2,
    CSV: 0.1,
}

encode_msgpack = msgspec.msgpack.Encoder(decimal_format="number").encode


def negotiate(accept: str | None) -> str:
    """The media type to answer in. Raises `ClientError` 406 when the client takes none of ours."""
    if not accept or accept in ("*/*", JSON):
        return JSON
    wanted = [_media_range(part) for part in accept.lower().split(",")]
    best = max(_OFFERED, key=lambda offered: _OFFERED[offered] * _quality(offered, wanted))
    if _quality(best, wanted) <= 0:
        message = f"Accept: expected one of {', '.join(_OFFERED)}, got {accept!r}"
        raise ClientError(message, status=406, code="not_acceptable")
    return best


def _media_range(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip() for piece in part.split(";"))
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            return name, _number(value)
    return name, 1.0


def _number(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0


def _quality(offered: str, wanted: list[tuple[str, float]]) -> float:
    """The client's quality for a type: that of its most specific matching range."""
    family = offered.partition("/")[0] + "/*"
    for name in (offered, family, "*/*"):
        for asked, quality in wanted:
            if asked == name:
                return quality * _liked(offered, name)
    return 0.0


def _liked(offered: str, matched: str) -> float:
    """A wildcard means JSON unless the client says more, and never what only a program reads."""
    if offered in (matched, JSON):
        return 1.0
    if offered.endswith("msgpack"):
        return 0.0
    return 0.5 if matched == "*/*" else 1.0


def serialize(value: Any, media_type: str) -> bytes:
    """One value as bytes of that type. Raises `ClientError` 406 for what has no form in it."""
    if media_type == TEXT and isinstance(value, str):
        return value.encode()
    if media_type == EVENTS:
        return encode_sse(value)
    if media_type == CSV:
        return encode_rows(value)
    if media_type.endswith("msgpack"):
        return encode_msgpack(value)
    body = encode_json(value)
    return body + b"\n" if media_type.endswith("ndjson") else body


def item_serializer(media_type: str) -> Callable[[Any], bytes]:
    """How each item of a stream becomes bytes of that type; JSON frames its array elsewhere."""
    if media_type == EVENTS:
        return encode_sse
    if media_type == TEXT:
        return lambda item: item.encode() if isinstance(item, str) else encode_json(item)
    if media_type.endswith("ndjson"):
        return lambda item: encode_json(item) + b"\n"
    if media_type == CSV:
        return Rows().encode
    return encode_msgpack if media_type.endswith("msgpack") else encode_json

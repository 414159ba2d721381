"""Accept → how a value, or a stream of values, becomes bytes; Content-Type → how bytes are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import yaml

from .errors import ClientError, RegistrationError
from .forms import decode_form
from .records import Rows, encode_rows
from .sse import encode_json, encode_sse, plain

JSON = "application/json"
NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"
TEXT = "text/plain"
OCTETS = "application/octet-stream"
CSV = "text/csv"
MSGPACK = "application/x-msgpack"
YAML = "application/yaml"

# More no client has a use for, and each is compared with each type.
_MOST_RANGES = 100
# What is longer as JSON takes seconds to lay out.
_LAID_OUT = 32_768
# A list is one byte as MessagePack, and fifty or more in memory. Bytes of texts are like those that
# begin one, half of them in Japanese: 10 MB of that are let in.
_MOST_LISTS = 5_000_000
_BEGINS = bytes((*range(0x80, 0xA0), *range(0xDC, 0xE0)))

Encode = Callable[[Any], bytes]
Decode = Callable[[bytes], Any]

_ANY = msgspec.json.Decoder()
_PACKER = msgspec.msgpack.Encoder(decimal_format="number", enc_hook=plain)


class ContentType(msgspec.Struct, frozen=True, kw_only=True):
    """A media type: how a value becomes its bytes, and how a request's body of it is read.

    `quality`, from 0 to 1, is how gladly it is sent: JSON has 0.8. `stream` makes, for one stream,
    what turns each item into bytes; without it each is a whole value. `extension` is what asks for
    it at the end of a path: `/notes.csv`. Only a type with `by_wildcard` is sent to who accepts
    `*/*` or the like. What `deserialize` raises is a 400.
    """

    serialize: Encode | None = None
    deserialize: Decode | None = None
    quality: float = 0.5
    stream: Callable[[], Encode] | None = None
    extension: str | None = None
    by_wildcard: bool = False


def _built_in() -> dict[str, ContentType]:
    """The types in the order that settles ties."""
    packed = ContentType(
        serialize=_encode_packed,
        deserialize=_decode_packed,
        quality=0.9,
        extension="msgpack",
    )
    lines = ContentType(
        serialize=_encode_line,
        deserialize=_ANY.decode_lines,
        quality=0.7,
        extension="ndjson",
        by_wildcard=True,
    )
    documents = ContentType(
        serialize=_encode_yaml,
        quality=0.7,
        stream=lambda: _encode_document,
        extension="yaml",
    )
    return {
        MSGPACK: packed,
        "application/msgpack": packed,
        JSON: ContentType(serialize=encode_json, quality=0.8, extension="json", by_wildcard=True),
        EVENTS: ContentType(serialize=encode_sse, quality=0.8, by_wildcard=True),
        "application/problem+json": ContentType(
            serialize=encode_json, quality=0.8, by_wildcard=True
        ),
        NDJSON: lines,
        "application/ndjson": lines,
        YAML: documents,
        "application/x-yaml": documents,
        "text/yaml": documents,
        TEXT: ContentType(serialize=_encode_text, quality=0.2, by_wildcard=True),
        CSV: ContentType(
            serialize=encode_rows,
            quality=0.1,
            stream=lambda: Rows().encode,
            extension="csv",
            by_wildcard=True,
        ),
        "application/x-www-form-urlencoded": ContentType(deserialize=decode_form),
    }


class ContentTypes:
    """The media types of one server, those of its plugins among them."""

    def __init__(self) -> None:
        self._types = _built_in()
        self._offered: dict[str, ContentType] = {}
        self._extensions: dict[str, str] = {}
        self.decoders: Mapping[str, Decode] = {}
        self._frozen = False
        self._index()

    def register(self, name: str, content_type: ContentType) -> None:
        """Send and read this media type too, or otherwise than the server does by itself.

        Raises `RegistrationError` for what cannot be a media type.
        """
        if not all(name.partition("/")) or name != name.lower() or set(name) & set(";, *"):
            message = f"{name!r}: expected a media type in lower case, such as application/cbor"
            raise RegistrationError(message)
        if self._frozen or name in (JSON, EVENTS):
            reason = "the server has started" if self._frozen else "it is the server's own"
            message = f"{name} cannot be registered: {reason}"
            raise RegistrationError(message)
        self._types[name] = content_type
        self._index()

    def freeze(self) -> None:
        """Take no more types."""
        self._frozen = True

    def negotiate(self, accept: str | None) -> str:
        """The media type to answer in. Raises `ClientError` 406 when the client takes none."""
        if not accept or accept in ("*/*", JSON):
            return JSON
        wanted = [_media_range(part) for part in accept.lower().split(",")[:_MOST_RANGES]]
        offered = self._offered
        best = max(offered, key=lambda name: offered[name].quality * self._liked(name, wanted))
        if self._liked(best, wanted) <= 0:
            message = f"Accept: expected one of {', '.join(offered)}, got {accept!r}"
            raise ClientError(message, status=406, code="not_acceptable")
        return best

    def of_extension(self, name: str) -> tuple[str, str] | None:
        """What stands before an extension, and the media type that it asks for."""
        stem, dot, extension = name.rpartition(".")
        named = dot and not stem.endswith("/")
        media = self._extensions.get(extension) if named else None
        return None if media is None else (stem, media)

    def serialize(self, value: Any, media_type: str) -> bytes:
        """One value as bytes of that type. Raises `ClientError` 406 for what has no form in it."""
        known = self._offered.get(media_type)
        return (
            encode_json(value)
            if known is None or known.serialize is None
            else known.serialize(value)
        )

    def item_serializer(self, media_type: str) -> Encode:
        """How each item of a stream becomes bytes; JSON frames its array elsewhere."""
        known = self._offered.get(media_type)
        if known is None or known.serialize is None:
            return encode_json
        return known.stream() if known.stream else known.serialize

    def _index(self) -> None:
        self._offered = {name: one for name, one in self._types.items() if one.serialize}
        self._extensions = {
            one.extension: name for name, one in reversed(self._offered.items()) if one.extension
        }
        self.decoders = {
            name: one.deserialize for name, one in self._types.items() if one.deserialize
        }

    def _liked(self, name: str, wanted: list[tuple[str, float]]) -> float:
        """The client's quality for a type: that of its most specific matching range.

        A wildcard means JSON unless the client says more, and never what only a program reads.
        """
        family = name.partition("/")[0] + "/*"
        for matched, share in ((name, 1.0), (family, 1.0), ("*/*", 0.5)):
            for asked, quality in wanted:
                if asked != matched:
                    continue
                if name in (matched, JSON):
                    return quality
                return quality * share if self._offered[name].by_wildcard else 0.0
        return 0.0


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


def _encode_text(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else encode_json(value)


def _encode_packed(value: Any) -> bytes:
    try:
        return _PACKER.encode(value)
    except OverflowError as error:
        raise _none_in(MSGPACK, "it holds an integer of more than 64 bits") from error


def _encode_line(value: Any) -> bytes:
    return encode_json(value) + b"\n"


def _decode_packed(data: bytes) -> Any:
    most = _MOST_LISTS
    if len(data) > most and len(data) - len(data.translate(None, _BEGINS)) > most:
        message = f"the body has more than {most} bytes that begin a list or a map, or are like it"
        raise ClientError(message, status=413, code="payload_too_large")
    return msgspec.msgpack.decode(data)


def _encode_yaml(value: Any) -> bytes:
    data = encode_json(value)
    if len(data) > _LAID_OUT:
        # JSON is YAML too.
        return encode_json(_FLOATS.decode(data)) + b"\n"
    plain = msgspec.json.decode(data)
    try:
        text: str = yaml.safe_dump(plain, allow_unicode=True, sort_keys=False)
    except RecursionError as error:
        raise _none_in(YAML, "it is nested too deeply for that") from error
    return text.encode()


def _none_in(media_type: str, why: str) -> ClientError:
    return ClientError(f"Accept: {media_type}: {why}", status=406, code="not_acceptable")


def _float(text: str) -> float | msgspec.Raw:
    """A number as older YAML knows one too: with a point and a sign where it has an exponent."""
    number = float(text)
    if "e" not in (exact := repr(number)):
        return number
    return msgspec.Raw((exact if "." in exact else exact.replace("e", ".0e")).encode())


_FLOATS = msgspec.json.Decoder(float_hook=_float)


def _encode_document(value: Any) -> bytes:
    return b"---\n" + _encode_yaml(value)

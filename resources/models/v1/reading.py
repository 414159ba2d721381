"""A request's body as its type, and the fields that the type does not know."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from harperpy import Body, InvalidBody, decode_json

from .wording import reworded

T = TypeVar("T", bound=msgspec.Struct)

# Each is decoded by itself.
_MOST_UNKNOWN = 1000
_ANY = msgspec.json.Decoder()
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Reader(Generic[T]):
    """Reads bodies as a type, and beside it what the type does not know."""

    def __init__(self, kind: type[T]) -> None:
        # Most bodies hold nothing else: this one is tried first.
        strict: Any = msgspec.defstruct(
            kind.__name__, [], bases=(kind,), forbid_unknown_fields=True
        )
        self._strict: msgspec.json.Decoder[T] = msgspec.json.Decoder(strict)
        self._decoder = msgspec.json.Decoder(kind)
        self._known = frozenset(kind.__struct_fields__)

    async def read(self, data: Body) -> tuple[T, dict[str, Any]]:
        """The body, and its fields that OpenAI's schema lacks: options of the provider's own.

        Raises `InvalidBody` worded as OpenAI's clients know it.
        """
        if data.is_json:
            try:
                return self._strict.decode(data.whole or await data.bytes()), {}
            except _UNREADABLE:
                pass  # It holds something else, or what is wrong with it is told below.
        try:
            request = await data.decode(self._decoder)
        except InvalidBody as error:
            raise reworded(error, self._decoder.type, _anything(await data.bytes())) from error
        fields = decode_json(await data.bytes(), _FIELDS)
        unknown = fields.keys() - self._known
        if len(unknown) > _MOST_UNKNOWN:
            message = f"expected at most {_MOST_UNKNOWN} fields that OpenAI does not know"
            raise InvalidBody(message)
        return request, {name: decode_json(bytes(fields[name]), _ANY) for name in unknown}


def _anything(body: bytes) -> Any:
    """A body as it is; None for one that Python has no value for."""
    try:
        return _ANY.decode(body)
    except _UNREADABLE:
        return None

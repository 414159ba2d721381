"""A request's body as its type, and the fields that the type does not know."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from harperpy import Body, InvalidBody, decode_json

from .wording import reworded

T = TypeVar("T", bound=msgspec.Struct)

_ANY = msgspec.json.Decoder()
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def read(data: Body, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type. Raises `InvalidBody` worded as OpenAI's clients know it."""
    try:
        return await data.decode(decoder)
    except InvalidBody as error:
        if not error.errors:
            raise
        raise reworded(error, decoder.type, _anything(await data.bytes())) from error


def _anything(body: bytes) -> Any:
    """A body as it is; None for one that Python has no value for."""
    try:
        return _ANY.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


async def unknown_fields(data: Body, decoder: msgspec.json.Decoder[T]) -> dict[str, Any]:
    """The fields that OpenAI's schema does not know: options of the provider's own."""
    fields = decode_json(await data.bytes(), _FIELDS)
    unknown = fields.keys() - set(decoder.type.__struct_fields__)
    return {name: decode_json(bytes(fields[name]), _ANY) for name in unknown}

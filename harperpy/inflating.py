"""Inflating: a body as it was before its `Content-Encoding`."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterable, AsyncIterator

from .errors import ClientError

# What zlib has to expect.
_WINDOWS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
_PIECE_BYTES = 64 * 1024
# Each costs time, and may have nothing in it.
_MOST_MEMBERS = 1000
_ACCEPTED = ", ".join(_WINDOWS)


async def inflated(chunks: AsyncIterable[bytes], encoding: str) -> AsyncIterator[bytes]:
    """The body in pieces of 64 KiB at most, whatever they were packed into.

    Raises `ClientError`: 415 for another encoding than gzip or deflate, 400 for what is none.
    """
    if encoding not in _WINDOWS:
        message = f"Content-Encoding: {encoding!r} cannot be read here; accepted: {_ACCEPTED}."
        accepts = {"Accept-Encoding": _ACCEPTED}
        raise ClientError(message, status=415, code="unsupported_encoding", headers=accepts)
    inflate = None
    members = 0
    try:
        async for chunk in chunks:
            rest = chunk
            while rest:
                if inflate is None or inflate.eof:
                    members += 1
                    if members > _MOST_MEMBERS:
                        raise _broken(encoding)
                    inflate = zlib.decompressobj(_window(encoding, rest))
                yield inflate.decompress(rest, _PIECE_BYTES)
                rest = inflate.unconsumed_tail or inflate.unused_data
        if inflate is not None:
            yield inflate.flush()
    except zlib.error as error:
        raise _broken(encoding) from error
    if inflate is not None and not inflate.eof:
        raise _broken(encoding)


def _window(encoding: str, data: bytes) -> int:
    # Many send deflate without the zlib head that it should have.
    bare = encoding == "deflate" and data[0] & 0x0F != zlib.DEFLATED
    return -zlib.MAX_WBITS if bare else _WINDOWS[encoding]


def _broken(encoding: str) -> ClientError:
    message = f"the request body is not what its headers say: it cannot be read as {encoding}"
    return ClientError(message, headers={"Connection": "close"})

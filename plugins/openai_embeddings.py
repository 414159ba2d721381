"""What the embeddings of an OpenAI-compatible provider are."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from harperpy import BackendError, EmbedResult, TokenUsage, Vector

from .openai_usage import Usage, understood

T = TypeVar("T")


class _Embedding(msgspec.Struct, Generic[T], gc=False):
    embedding: T
    index: int = 0


class _Embeddings(msgspec.Struct, Generic[T], gc=False):
    """A provider's embeddings."""

    data: list[_Embedding[T]]
    usage: Usage | None = None


_decode = msgspec.json.Decoder(_Embeddings[msgspec.Raw]).decode
_decode_rest = msgspec.json.Decoder(_Embeddings[int]).decode
# In a text it would stand with backslashes.
_KEY = b'"embedding":'


def embedded(data: bytes) -> EmbedResult:
    """Embeddings in the order of what was embedded. Raises `DecodeError` and `BackendError`."""
    told = understood(_decode, data)
    return _result(told, [bytes(one.embedding) for one in told.data])


def passed_on(data: bytes) -> EmbedResult:
    """As `embedded`, for who has arrays as they came; whether each number is one is not looked at.

    To find where an array ends takes a fraction of what it takes to parse it.
    """
    rest, arrays = _apart(data)
    if not arrays:
        return embedded(data)
    told = understood(_decode_rest, rest)
    if [one.embedding for one in told.data] != list(range(len(arrays))):
        return embedded(data)
    return _result(told, arrays)


def _apart(data: bytes) -> tuple[bytes, list[bytes]]:
    """An answer with a number in the place of each array, and the arrays."""
    parts: list[bytes] = []
    arrays: list[bytes] = []
    end, at = 0, data.find(_KEY)
    while at >= 0:
        at += len(_KEY)
        begin = data.find(b"[", at)
        if begin < 0 or data[at:begin].strip():
            return data, []
        parts += data[end:at], b"%d" % len(arrays)
        end = data.find(b"]", begin) + 1 or len(data)
        arrays.append(data[begin:end])
        at = data.find(_KEY, end)
    return b"".join((*parts, data[end:])), arrays


def _result(told: _Embeddings[Any], texts: list[bytes]) -> EmbedResult:
    given = list(zip(told.data, texts, strict=True))
    if len(given) > 1:
        given.sort(key=lambda one: one[0].index)
    # What else it counts is no part of it; some say the total alone.
    tokens = None if told.usage is None else told.usage.asked
    usage = None if tokens is None else TokenUsage(embedding_tokens=tokens)
    try:
        return EmbedResult(vectors=[_vector(text) for _, text in given], usage=usage)
    except BackendError as error:
        error.usage = usage
        raise


def _vector(text: bytes) -> Vector:
    """What it is, whichever way it was sent. Raises `BackendError`."""
    try:
        if text[:1] == b'"':
            return Vector.from_base64(msgspec.json.decode(text, type=str))
        return Vector.from_json(text)
    except ValueError as error:
        message = f"an embedding is not what it should be: {error}"
        raise BackendError(message) from error

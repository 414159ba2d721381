"""What the refusals of an OpenAI-compatible provider mean."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from harperpy import (
    BackendError,
    BackendTimeout,
    HarperError,
    UpstreamAuthError,
    UpstreamRejected,
)

_PASSED_ON = frozenset({400, 404, 409, 413, 422, 429})
_LONGEST_MESSAGE = 500
# What another harperpy calls its own faults: behind a chain of them it looks like one.
_OUR_CODES = frozenset({"upstream_auth_error", "timeout", "model_unavailable", "aborted"})
_KEY = re.compile(r"\b(?:sk|hk|pk|gsk|xai)[-_][\w-]{6,}|(?i:bearer)\s+\S+")


class _Error(msgspec.Struct):
    message: str | None = None
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class _Envelope(msgspec.Struct):
    error: _Error | str | None = None


_ENVELOPE = msgspec.json.Decoder(_Envelope)


def refusal(
    status: int, body: bytes, headers: Mapping[str, str], secret: str | None
) -> HarperError:
    """The error for a provider's error answer; what may pass on does, our key never."""
    retry_after = headers.get("retry-after")
    passing = {"Retry-After": retry_after} if retry_after else {}
    if status in (401, 403):
        return UpstreamAuthError(f"the provider answered {status}", upstream_status=status)
    if status in _PASSED_ON:
        told = _told(body)
        message = _masked(told.message or f"The model provider answered {status}.", secret)
        error: HarperError = UpstreamRejected(
            message[:_LONGEST_MESSAGE],
            upstream_status=status,
            type=told.type,
            param=told.param,
            code=None if told.code is None else str(told.code),
            headers=passing,
        )
    elif status == 408:
        error = BackendTimeout("the provider answered 408", upstream_status=status)
    else:
        ours = status if 500 <= status <= 599 else 502
        said = f"the provider answered {status}"
        error = BackendError(
            said, status=ours, code=_our_code(body), upstream_status=status, headers=passing
        )
    error.retryable = status in (408, 429) or status >= 500
    error.retry_after = _seconds(retry_after)
    return error


def _told(body: bytes) -> _Error:
    try:
        told = _ENVELOPE.decode(body).error
    except msgspec.DecodeError:
        return _Error()
    return told if isinstance(told, _Error) else _Error(message=told)


def _our_code(body: bytes) -> str | None:
    code = _told(body).code
    return code if isinstance(code, str) and code in _OUR_CODES else None


def _masked(message: str, secret: str | None) -> str:
    if secret:
        message = message.replace(secret, "[redacted]")
    return _KEY.sub("[redacted]", message)


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        # An HTTP date: too far off to wait here; it passes on as it is.
        return float("inf")

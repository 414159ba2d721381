"""What the refusals of an OpenAI-compatible provider mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

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
_OF_A_CODE = {"upstream_auth_error": UpstreamAuthError, "timeout": BackendTimeout}
_KEY = re.compile(r"\b(?:sk|hk|pk|gsk|xai)[-_][\w-]{6,}|(?i:bearer)\s+\S+")


class _Error(msgspec.Struct):
    message: str | None = None
    type: str | None = None
    param: str | None = None
    code: str | None = None


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
        words = (told.type, told.param, told.code)
        type_, param, code = (word and _masked(word, secret) for word in words)
        error: HarperError = UpstreamRejected(
            message[:_LONGEST_MESSAGE],
            upstream_status=status,
            type=type_,
            param=param,
            code=code,
            headers=passing,
        )
    elif status == 408:
        error = BackendTimeout("the provider answered 408", upstream_status=status)
    else:
        ours = status if 500 <= status <= 599 else 502
        code = our_code(_told(body).code)
        kind = _OF_A_CODE.get(code or "", BackendError)
        said = f"the provider answered {status}"
        error = kind(said, status=ours, code=code, upstream_status=status, headers=passing)
    error.retryable = status in (408, 429) or status >= 500
    error.retry_after = _seconds(retry_after)
    return error


def our_code(code: object) -> str | None:
    """A code that another harperpy gave; None for any other."""
    return code if isinstance(code, str) and code in _OUR_CODES else None


def _told(body: bytes) -> _Error:
    """What a refusal says, in OpenAI's form or in the plainer ones that others use."""
    try:
        given = _first(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Error()
    error: Any = _field(given, "error") or given
    if isinstance(error, str):
        return _Error(message=error)
    words = [_field(error, name) for name in ("message", "detail")]
    code = _field(error, "code")
    return _Error(
        message=next((word for word in words if isinstance(word, str)), None),
        type=_word(_field(error, "type")),
        param=_word(_field(error, "param")),
        code=str(code) if isinstance(code, int) else _word(code),
    )


def _first(given: Any) -> Any:
    """The value; of a list, which some answer with, its first."""
    if isinstance(given, list) and given:
        return cast("list[object]", given)[0]
    return cast("Any", given)


def _field(given: Any, name: str) -> Any:
    return cast("dict[str, Any]", given).get(name) if isinstance(given, dict) else None


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


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

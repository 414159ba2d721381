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
# What an error within a good answer says of the status that it should have had, by what names.
_STATUSES = ("status", "status_code", "code")
_OF_A_WORD = {
    **dict.fromkeys(("context_length_exceeded", "content_filter", "tool_use_failed"), 400),
    **dict.fromkeys(("invalid_api_key", "authentication_error"), 401),
    "permission_error": 403,
    **dict.fromkeys(("model_not_found", "not_found_error"), 404),
    **dict.fromkeys(("rate_limit_exceeded", "rate_limit_error", "insufficient_quota"), 429),
    "overloaded_error": 503,
    # OpenAI's type of many of them.
    "invalid_request_error": 400,
}
_STATUS = re.compile("[45][0-9]{2}")
_KEY = re.compile(r"\b(?:sk|hk|pk|gsk|xai)[-_][\w-]{6,}|(?i:bearer)\s+\S+")


class _Error(msgspec.Struct):
    message: str | None = None
    type: str | None = None
    param: str | None = None
    code: str | None = None
    status: int | None = None


def refusal(
    status: int, body: bytes, headers: Mapping[str, str], secret: str | None
) -> HarperError:
    """The error for a provider's error answer; what may pass on does, our key never."""
    return _refusal(status, _told(_first(_decoded(body))), headers, secret)


def told_refusal(body: bytes | str, secret: str | None) -> HarperError | None:
    """The error that an answer of status 200, or an event of its stream, tells; None for none."""
    given = _first(_decoded(body))
    own = [_field(_first(_field(given, "choices")), "error"), _field(given, "error")]
    told = _told(next(filter(says, own), given))
    if told.status is not None:
        return _refusal(told.status, told, {}, secret)
    if not (told.message or any(map(says, own))):
        return None
    # The words of a fault without a status are nobody's to read, as those of a 5xx.
    return _fault("the provider told of an error in an answer of status 200", told)


def _refusal(
    status: int, told: _Error, headers: Mapping[str, str], secret: str | None
) -> HarperError:
    retry_after = headers.get("retry-after")
    passing = {"Retry-After": retry_after} if retry_after else {}
    if status in (401, 403):
        return UpstreamAuthError(f"the provider answered {status}", upstream_status=status)
    if status in _PASSED_ON:
        message = _masked(told.message or f"The model provider answered {status}.", secret)
        words = (told.type, told.param, told.code)
        type_, param, code = (word and _masked(word, secret)[:_LONGEST_MESSAGE] for word in words)
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
        said = f"the provider answered {status}"
        error = _fault(said, told, status=ours, upstream_status=status, headers=passing)
    error.retryable = status in (408, 429) or status >= 500
    error.retry_after = _seconds(retry_after)
    return error


def _fault(said: str, told: _Error, **more: Any) -> HarperError:
    """The error for a fault of the provider's own, as another harperpy calls it, if it is one."""
    code = told.code if told.code in _OUR_CODES else None
    kind = _OF_A_CODE.get(code or "", BackendError)
    return kind(said, code=code, **more)


def _decoded(body: bytes | str) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _told(given: Any) -> _Error:
    """What a refusal says, in OpenAI's form or in the plainer ones that others use."""
    error: Any = _field(given, "error") or given
    if isinstance(error, str):
        return _Error(message=error)
    words = [_field(error, name) for name in ("message", "detail", "msg")]
    code = _field(error, "code")
    told = _Error(
        message=next((word for word in words if isinstance(word, str)), None),
        type=_word(_field(error, "type")),
        param=_word(_field(error, "param")),
        code=str(code) if isinstance(code, int) else _word(code),
    )
    numbers = [_number(_field(error, name)) for name in _STATUSES]
    meant = [_OF_A_WORD.get(word or "") for word in (told.code, told.type)]
    told.status = next((one for one in (*numbers, *meant) if one), None)
    return told


def _number(value: Any) -> int | None:
    """A status that refuses, whether as a number or as text."""
    given = int(value) if isinstance(value, str) and _STATUS.fullmatch(value) else value
    return given if type(given) is int and 400 <= given <= 599 else None


def says(error: Any) -> bool:
    """Whether there is an error: some relays send one of empty words with each answer."""
    return any(cast("dict[str, Any]", error).values()) if isinstance(error, dict) else bool(error)


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

"""Preconditions: requests for one version of a thing, RFC 9110 section 13."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

from .errors import PreconditionFailed

_SAFE = "!#$%&'()*+,-./:;<=>?@[]^_`{|}~"
_TAG = re.compile(r'(W/)?("[^"]*")')


def quoted(etag: str) -> str:
    """The version as a header names it; what may not stand there is percent-encoded."""
    return f'"{quote(etag, safe=_SAFE)}"'


def is_known(headers: Mapping[str, str], etag: str) -> bool:
    """Whether `If-None-Match` says that the client has this version already."""
    told = headers.get("if-none-match")
    return told is not None and (told.strip() == "*" or quoted(etag) in _tags(told, weak=True))


def check_version(headers: Mapping[str, str], etag: str | None) -> None:
    """Raises `PreconditionFailed` for a write that is meant for another version than `etag`."""
    wanted = headers.get("if-match")
    if wanted is not None:
        if etag is None or not (wanted.strip() == "*" or quoted(etag) in _tags(wanted, weak=False)):
            message = "If-Match: it is not the version that is there"
            raise PreconditionFailed(message)
    elif etag is not None and is_known(headers, etag):
        message = "If-None-Match: it is there already"
        raise PreconditionFailed(message)


def _tags(header: str, *, weak: bool) -> set[str]:
    return {tag for mark, tag in _TAG.findall(header) if weak or not mark}

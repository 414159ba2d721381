"""Caching: what caches between a client and the server may keep, and for whom."""

from __future__ import annotations

from email.utils import formatdate

from multidict import CIMultiDict

from .context import Context
from .names import AUTHORIZATION, CACHE_CONTROL, VARY
from .preconditions import is_known, quoted

PRIVATE = "private, no-cache"
"""What is said of an answer to somebody who was recognised; that it varies with them, too."""


def vary(headers: CIMultiDict[str], on: str) -> None:
    """Say that the answer depends on this header of the request too."""
    known = headers.getall(VARY, None)
    if known is None:
        headers[VARY] = on
        return
    told = ", ".join(known)
    names = told.lower().replace(" ", "").split(",")
    if "*" not in names and on.lower() not in names:
        headers[VARY] = f"{told}, {on}"


def tell_version(headers: CIMultiDict[str], context: Context, status: int) -> bool:
    """Say which version it is. Whether the client has it already, so that 304 is the answer."""
    if not 200 <= status < 300:
        return False
    if context.last_modified is not None:
        headers.setdefault("Last-Modified", formatdate(context.last_modified, usegmt=True))
    if context.etag is None:
        return False
    headers.setdefault("ETag", quoted(context.etag))
    return context.method in ("GET", "HEAD") and is_known(context.headers, context.etag)


def keep_private(headers: CIMultiDict[str], context: Context, status: int) -> None:
    """No cache gives one caller's answer to another, unless the handler says that it may."""
    if context.user is None and status != 401 and AUTHORIZATION not in context.headers:
        return
    told = headers.get(CACHE_CONTROL)
    if told is None:
        headers[CACHE_CONTROL] = PRIVATE
    elif "public" in (told := told.lower()) or "s-maxage" in told:
        return
    vary(headers, "Authorization")

"""Context: all that a verb may know besides its target."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from multidict import CIMultiDict

from .accounting import Caller, current_caller
from .auth import User
from .errors import HarperError
from .request import Request
from .signal import AbortController

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .models import Models


class Context(Caller):
    """One request's context: who asks, from where, and what the answer's head will carry.

    `signal` fires when the client leaves before the answer is complete, never when it is.
    `status` and `response_headers` apply to plain return values and to streams, until the head is
    sent. `started` is when it began, by `time.perf_counter()`. `rejection` is the refused
    credential of a resource that settles credentials itself.
    """

    __slots__ = (
        "_controller",
        "models",
        "rejection",
        "request",
        "response_headers",
        "started",
        "status",
    )

    def __init__(self, request: Request, models: Models, user: User | None = None) -> None:
        self._controller = AbortController()
        super().__init__(user=user, request_id=request.id, signal=self._controller.signal)
        self.started = time.perf_counter()
        self.request = request
        self.models = models
        self.response_headers: CIMultiDict[str] = CIMultiDict()
        self.status: int | None = None
        self.rejection: HarperError | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """The request's headers, looked up in any case."""
        return self.request.headers

    @property
    def method(self) -> str:
        """The request's method."""
        return self.request.method

    @property
    def path(self) -> str:
        """The request's path as the client sent it."""
        return self.request.path

    @property
    def handler_path(self) -> str:
        """The path the answering resource is mounted at, without a leading slash."""
        return self.app or ""

    @property
    def last_event_id(self) -> str | None:
        """Where a reconnecting event stream client wants to go on."""
        return self.request.headers.get("last-event-id")

    def abort(self, reason: str) -> None:
        """Fire the signal: the server calls this when the client has left."""
        self._controller.abort(reason)


def get_context() -> Context:
    """The running request's context, in handlers, generators and the tasks they start.

    Raises `LookupError` outside a request.
    """
    context = current_caller.get()
    if not isinstance(context, Context):
        message = "get_context() was called outside a request"
        raise LookupError(message)  # noqa: TRY004  # there is no request to look up
    return context

"""Every refusal harperpy can make, with the status and code it carries.

HarperError                      500  any refusal; `status`, `code`, `param`, `type`, `headers`
├── ClientError                  400  the caller can mend it
│   ├── InvalidBody              400  a body or value that does not decode; `param` is its path
│   ├── InvalidCredentials       401  a credential was sent and is wrong, expired or malformed
│   │   └── TooManyAttempts      429  so many were wrong that the next one is not looked at yet
│   ├── AccessViolation      401/403  nobody is logged in, or this user may not
│   │   └── NotAuthorised        403  the same of an operation, with what is lacking
│   ├── NotFound                 404
│   │   └── ModelNotFound        404  no backend answers to that model name
│   ├── MethodNotAllowed         405  `allow` lists what the resource answers
│   ├── Conflict                 409
│   ├── PreconditionFailed       412  the version that a write is meant for is not there any more
│   ├── BodyTimeout              408
│   ├── PayloadTooLarge          413
│   ├── CapabilityError          400  the model's backend lacks what the call needs
│   ├── LimitReached             429  a rate, a place or a budget is used up; `Retry-After`
│   ├── PriceUnknown             403  a budget of money, and a model that has no price
│   └── UpstreamRejected         4xx  a provider refused the call's content; its words pass on
├── ServerError                  500  ours to mend; the text never leaves the house
│   ├── NotImplementedYet        501
│   ├── AnswerTimeout            504
│   ├── ServiceUnavailable       503
│   │   └── ModelUnavailable     503  a model is loading or cannot load; says what mends it
│   ├── TransactionError         500  a transaction is used as it cannot be; the log says how
│   ├── PluginNotStarted         500  the mount belongs to a plugin that failed
│   └── BackendError             502  a model provider failed; `upstream_status`
│       ├── BackendTimeout       504
│       └── UpstreamAuthError    502  the provider refused *our* credentials
├── ResponseError                  -  a whole Response, raised; stands beside it in content.py
├── Aborted                      499  the caller left, or its signal fired; never sent
└── SetupError                     -  raised while a server is put together, never on the wire
    ├── ConfigError
    ├── ResourceConflict
    └── RegistrationError
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

WHATEVER = (Exception, SystemExit)
"""What the code of others may raise: `sys.exit()` ends no server."""


class HarperError(Exception):
    """A refusal with a status; what of it may be said to a caller is `public_message`.

    `report` are members that the operations port adds to its answer. `retryable` says that the same
    call may succeed in a moment, `retry_after` in how many seconds. `usage` is the `TokenUsage`
    that a call at a model took all the same.
    """

    status: int = 500
    code: str | None = None
    param: str | None = None
    type: str | None = None
    report: Mapping[str, Any] | None = None
    retryable: bool = False
    retry_after: float | None = None
    usage: Any = None
    title: ClassVar[str] = "The server had an error while processing the request."

    def __init__(
        self,
        message: str | None = None,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,  # noqa: A002
        headers: Mapping[str, str] | None = None,
        errors: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message or self.title)
        self.headers: dict[str, str] = dict(headers or {})
        self.errors = errors
        if status is not None:
            self.status = status
        if code is not None:
            self.code = code
        if param is not None:
            self.param = param
        if type is not None:
            self.type = type

    @property
    def public_message(self) -> str:
        """The sentence a caller may read: the error's own below 500, the class's title above."""
        return str(self) if self.status < 500 else self.title

    @property
    def logged(self) -> str:
        """What the log says of it."""
        return str(self)


class ClientError(HarperError):
    """The request cannot be answered as it stands."""

    status = 400
    title = "The request is not valid."


class InvalidBody(ClientError):
    """A body or value that does not decode; `errors` lists `{path, message}` with JSON pointers."""


class InvalidCredentials(ClientError):
    """A credential was sent and is wrong, expired or malformed; `username` is whom it names."""

    username: str | None = None

    status = 401
    code = "invalid_api_key"
    title = "The credential is wrong or expired."


class TooManyAttempts(InvalidCredentials):
    """After many wrong passwords not even a right one is looked at until `Retry-After`."""

    status = 429
    code = "too_many_attempts"
    title = "Too many wrong passwords; try again later."


class AccessViolation(ClientError):
    """401 when nobody is logged in, 403 when this user may not."""

    def __init__(self, user: object | None, message: str | None = None) -> None:
        if user is None:
            super().__init__(message or "No credential was sent: must log in.", status=401)
        else:
            default = "This user may not do that here."
            super().__init__(message or default, status=403, code="insufficient_permissions")


class NotAuthorised(AccessViolation):
    """403 of an operation: what the caller lacks, and what is not there for them."""

    def __init__(
        self,
        user: object | None,
        lacks: Sequence[Any],
        unknown: Sequence[str],
    ) -> None:
        super().__init__(
            user,
            "This operation is not authorized due to role restrictions and/or invalid database "
            "items",
        )
        self.report = {"unauthorized_access": [*lacks], "invalid_schema_items": [*unknown]}


class NotFound(ClientError):
    """Nothing stands at that path or under that name."""

    status = 404
    title = "Not found."


class ModelNotFound(NotFound):
    """No backend of that kind answers to the model name."""

    code = "model_not_found"
    param = "model"


class MethodNotAllowed(ClientError):
    """The resource does not answer that method; `Allow` says which it does."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, method: str, allow: tuple[str, ...]) -> None:
        listed = ", ".join(allow)
        super().__init__(
            f"Method {method} is not allowed here; allowed: {listed}.", headers={"Allow": listed}
        )


class Conflict(ClientError):
    """It exists already, or something else stands in its way."""

    status = 409


class PreconditionFailed(ClientError):
    """The version that a write is meant for is not the one that is there."""

    status = 412
    code = "precondition_failed"


class BodyTimeout(ClientError):
    """The body did not arrive in time."""

    status = 408
    code = "request_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request body took more than {seconds:g} s to arrive")


class PayloadTooLarge(ClientError):
    """The body is larger than this server takes."""

    status = 413
    code = "payload_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than the limit of {limit} bytes.")


class CapabilityError(ClientError):
    """The model's backend lacks what the call needs; `param` is the field that asked for it."""

    code = "unsupported_parameter"


class LimitReached(ClientError):
    """A limit of ours is reached: `retry_after` seconds from now there is room again, if known."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, seconds: float | None, **details: Any) -> None:
        headers = {} if seconds is None else _in_time(seconds)
        super().__init__(message, headers=headers, **details)
        self.retry_after = seconds


def _in_time(seconds: float) -> dict[str, str]:
    """When to come again: whole seconds for everyone, milliseconds for who reads them."""
    milliseconds = max(1, math.ceil(seconds * 1000))
    whole = str(math.ceil(milliseconds / 1000))
    return {"Retry-After": whole, "retry-after-ms": str(milliseconds)}


class PriceUnknown(ClientError):
    """Nobody knows what the model costs, and the caller's budget is one of money."""

    status = 403
    code = "price_unknown"
    param = "model"
    type = "invalid_request_error"


class UpstreamRejected(ClientError):
    """A provider refused the call for its content; its message, type, param and code pass on."""

    def __init__(self, message: str, *, upstream_status: int, **details: Any) -> None:
        super().__init__(message, status=upstream_status, **details)
        self.upstream_status = upstream_status

    @property
    def logged(self) -> str:
        """No word of the provider's: they may quote what it was asked."""
        return f"the provider answered {self.upstream_status}"


class ServerError(HarperError):
    """Ours to mend."""


class NotImplementedYet(ServerError):
    """Asked for by a documented name that this version does not have; the text may be read."""

    status = 501

    @property
    def public_message(self) -> str:
        """The error's own text: it names a missing feature, never an internal."""
        return str(self)


class AnswerTimeout(ServerError):
    """A verb took longer than `http.timeout` or its class's `time_limit`."""

    status = 504
    code = "timeout"
    title = "The answer took longer than this server allows."


class ServiceUnavailable(ServerError):
    """Not now; `Retry-After` may say when."""

    status = 503
    title = "The service is not available at the moment; try again later."


class ModelUnavailable(ServiceUnavailable):
    """A model cannot answer yet, or any more; the text says why and what mends it."""

    code = "model_unavailable"

    @property
    def public_message(self) -> str:
        """The error's own text: it is written for whoever asked."""
        return str(self)


class TransactionError(ServerError):
    """A transaction is used as it cannot be; the text, for the log, says how to mend it."""


class PluginNotStarted(ServerError):
    """The mount or model belongs to a plugin that failed to start; the cause is in the log."""

    @property
    def public_message(self) -> str:
        """The plugin's name, never its cause."""
        return str(self)


class BackendError(ServerError):
    """A model provider failed; `upstream_status` is its status, if it gave one.

    `stale` says that a connection of an earlier call was gone: the same call is made once more.
    """

    status = 502
    stale = False
    title = "The model provider failed to answer."

    def __init__(
        self,
        message: str | None = None,
        *,
        upstream_status: int | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.upstream_status = upstream_status


class BackendTimeout(BackendError):
    """A model provider did not connect, begin, continue or end in time."""

    status = 504
    code = "timeout"
    title = "The model provider did not answer in time."


class UpstreamAuthError(BackendError):
    """The provider refused our credentials; the caller's own are fine."""

    code = "upstream_auth_error"
    title = "The model provider refused this server's credentials."


class Aborted(HarperError):
    """The caller left, or the signal it gave fired. Logged as 499, never sent."""

    status = 499
    code = "aborted"
    title = "The call was aborted."


class SetupError(HarperError):
    """Raised while a server is put together: one sentence for the operator."""

    @property
    def public_message(self) -> str:
        """The title alone: set-up details are for the operator, not for callers."""
        return self.title


class ConfigError(SetupError):
    """config.yaml or the environment says what cannot be; names file, key and expectation."""


class ResourceConflict(SetupError):
    """Two resources want one path."""


class RegistrationError(SetupError):
    """A resource, backend or operation that cannot be registered as it is; says how to mend it."""


def logged(error: BaseException) -> str:
    """An error as a line of the log has it: its kind, and what may be said of it there."""
    text = error.logged if isinstance(error, HarperError) else str(error)
    return f"{type(error).__name__}: {text}"

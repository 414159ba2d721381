"""Any path under /v1 that the gateway does not have: 404 `unknown_url`, for who is logged in."""

from __future__ import annotations

from typing import NoReturn

from harperpy import Context, NotFound, RequestTarget, User

from .errors import OpenAIResource


class V1Unknown(OpenAIResource):
    """Says which URL it does not know."""

    sub_paths = True

    @staticmethod
    def get(target: RequestTarget, context: Context) -> NoReturn:
        """Refuse."""
        message = f"Unknown request URL: {context.method} {context.path}."
        raise NotFound(message, code="unknown_url")

    @staticmethod
    def post(target: RequestTarget, data: object, context: Context) -> NoReturn:
        """Refuse."""
        V1Unknown.get(target, context)

    put = patch = query = post
    delete = get

    @staticmethod
    def allow_read(user: User | None, target: RequestTarget, context: Context) -> bool:
        """Anyone logged in may learn that there is nothing."""
        return user is not None

    allow_create = allow_update = allow_delete = allow_read

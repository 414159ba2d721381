"""Any path under /v1 that the gateway does not have: 404 `unknown_url`, for who is logged in."""

from __future__ import annotations

from typing import NoReturn

from harperpy import Context, NotFound, RequestTarget, User

from .errors import OpenAIResource

_CHAT = (
    "use chat completions instead: openai.chat(model) in the AI SDK, "
    "ChatOpenAI(use_responses_api=False) in LangChain, OpenAIChatModel in Pydantic AI, "
    "set_default_openai_api('chat_completions') in the Agents SDK, "
    "client.chat.completions in OpenAI's own."
)
_MISSING = {
    "/v1/responses": f"The Responses API does not exist here yet; {_CHAT}",
    "/v1/completions": f"The legacy Completions API does not exist here; {_CHAT}",
}


class V1Unknown(OpenAIResource):
    """Says which URL it does not know."""

    sub_paths = True
    hidden = True

    @staticmethod
    def get(target: RequestTarget, context: Context) -> NoReturn:
        """Refuse."""
        message = f"Unknown request URL: {context.method} {context.path}."
        for path, instead in _MISSING.items():
            if f"{context.path}/".startswith(f"{path}/"):
                message += f" {instead}"
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

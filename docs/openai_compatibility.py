"""Writes openai-compatibility.md from the gateway's own table: `make docs`."""

from collections.abc import Iterator
from pathlib import Path

from harperpy.plugins.echo import Echo
from harperpy.plugins.local import LocalChat
from harperpy.plugins.openai import OpenAI
from harperpy.resources.models.v1.parameters import CHAT, EMBEDDINGS, PARTS, Parameter

from harperpy import Capability, ModelBackend

PAGE = Path(__file__).with_name("openai-compatibility.md")
BACKENDS: tuple[type[ModelBackend], ...] = (OpenAI, LocalChat, Echo)

HEAD = """\
# OpenAI compatibility

`/v1` speaks OpenAI's protocol: clients made for it work unchanged. This page says for each field
what happens to it. It is made from the gateway's own table, and tests hold both to the `openai`
package, field by field.

| endpoint | |
| --- | --- |
| `POST /v1/chat/completions` | whole, or streamed with `stream: true` |
| `POST /v1/embeddings` | as floats or base64 |
| `GET /v1/models`, `GET /v1/models/{id}` | what callers may name; ids may hold slashes |
| anything else below `/v1` | 404 `unknown_url` |

The Responses API does not exist yet. Tell clients that use it by default to use chat completions:

| client | setting |
| --- | --- |
| AI SDK (`@ai-sdk/openai`) | `openai.chat(model)` |
| LangChain (`ChatOpenAI`) | `use_responses_api=False` (`useResponsesApi: false`) |
| Pydantic AI | `OpenAIChatModel` |
| Agents SDK | `set_default_openai_api('chat_completions')` |

## Parameters

*Honoured*: reaches the model. *Accepted*: without effect on the answer, by OpenAI's own contract.
Where a backend lacks what a parameter needs (marked ✗), the call is refused with 400
`unsupported_parameter` and the parameter's name in `param`; nothing is ignored silently. `null` is
the same as absent. The values in brackets ask for nothing, so every backend takes them. What the
`openai` backend passes on, the provider may still refuse: its own error comes back.

Fields that OpenAI does not know (`extra_body` in its clients; a thousand at most) go to the
provider as they are. That is for fields of the body: what it does not know within a message, a tool
or another object is left out, save for `reasoning_content`, `reasoning_details`, `cache_control` of
parts and `extra_content` of tool calls. The local model takes `top_k`, `min_p`, `typical_p` and
`repeat_penalty`, and no others.

### Chat completions
"""

ROLES = """\
Messages have the roles `developer`, `system`, `user`, `assistant`, `tool` and `function`. Each
result of a tool answers a call of the message before it, and each call has its result.
"""

TAIL = """\
## Answers

Whole and streamed answers hold OpenAI's required fields and no others, save for what a provider
itself adds of this list: `system_fingerprint`, `service_tier`, `moderation`, `reasoning_content`,
`reasoning_details`, `annotations`, `audio`, and the details of `usage`. `id` and `created` are
fresh for each call and the same on all chunks of a stream. `finish_reason` is `tool_calls` whenever
there are calls to make; the arguments of a function that takes none are `{}`, whatever a provider
sends. Each answer carries `x-request-id`, `openai-processing-ms` and `openai-version`.

A provider's own word for its end becomes one of OpenAI's (`max_tokens` is `length`). One that says
`error` has failed: the next model is asked, or the answer is a 502.

A stream that fails after it has begun ends with one `data: {"error": …}` and no `[DONE]`.

## Errors

| cause | status | `type` | `code` |
| --- | --- | --- | --- |
| no credential | 401 | `invalid_request_error` | |
| a wrong or expired one | 401 | `invalid_request_error` | `invalid_api_key` |
| not allowed | 403 | `permission_error` | `insufficient_permissions` |
| no such model | 404 | `invalid_request_error` | `model_not_found` |
| no such path | 404 | `invalid_request_error` | `unknown_url` |
| wrong method | 405 | `invalid_request_error` | `method_not_supported` |
| a field that does not fit | 400 | `invalid_request_error` | OpenAI's, with `param` |
| the backend cannot do that | 400 | `invalid_request_error` | `unsupported_parameter` |
| body too large | 413 | `invalid_request_error` | `payload_too_large` |
| the provider's 400, 404, 409, 413, 422, 429 | the same | the provider's | the provider's |
| the provider refuses this server's key | 502 | `server_error` | `upstream_auth_error` |
| the provider is too slow, or says 408 | 504 | `server_error` | `timeout` |
| the provider cannot be reached, or understood | 502 | `server_error` | |
| the provider's 5xx | the same | `server_error` | |

`Retry-After` of a provider's 429 or 503 passes on. An error that a provider tells within an answer
of status 200, or in a stream, is as one of the status that it names, by number or by one of
OpenAI's words; one that names none is a 502.
"""


def can(backend: type[ModelBackend], capability: Capability) -> bool:
    """Whether every instance of a backend has a capability."""
    return capability in backend.capabilities(backend)  # type: ignore[arg-type]


def table(parameters: tuple[Parameter, ...], kind: str) -> Iterator[str]:
    """The parameters as a Markdown table, with a column for each backend."""
    yield f"| {kind} | | {' | '.join(f'`{backend.name}`' for backend in BACKENDS)} | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for one in parameters:
        marks = ["✓" if one.needs is None or can(it, one.needs) else "✗" for it in BACKENDS]
        idle = f" ({', '.join(f'`{value}`' for value in one.idle)})" if one.idle else ""
        yield f"| `{one.name}`{idle} | {one.effect} | {' | '.join(marks)} | {one.note} |"
    yield ""


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        *table(CHAT, "parameter"),
        "### Parts of a message",
        "",
        *table(PARTS, "part"),
        ROLES,
        "### Embeddings",
        "",
        "| parameter | | |",
        "| --- | --- | --- |",
        *(f"| `{one.name}` | {one.effect} | {one.note} |" for one in EMBEDDINGS),
        "",
        TAIL,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""An inbound webhook: signed events from outside, each kept once and worked off in the background.

Signatures are those of https://www.standardwebhooks.com, which OpenAI, Svix and others send.
"""

from typing import Annotated

import msgspec

from harperpy import Scope

from .resources import events, webhook
from .signatures import Verifier
from .store import Store
from .worker import Worker


class Options(msgspec.Struct, forbid_unknown_fields=True):
    tolerance: Annotated[int, msgspec.Meta(ge=1)] = 300
    """How many seconds an event's timestamp may be off."""


async def handle_application(scope: Scope) -> None:
    options = scope.options.decode(Options)
    verifier = Verifier(scope.secrets.get("WEBHOOK_SECRET"), options.tolerance)
    store = await Store.open(scope.database)
    worker = Worker(store, scope.logger)
    scope.create_task(worker.run(), name="webhook worker")
    scope.resources.set("webhook", webhook(verifier, worker))
    scope.resources.set("webhook/events", events())

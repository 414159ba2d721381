"""The door for senders, and the list for super users."""

from typing import Annotated, Any

import msgspec

from harperpy import Body, Context, RequestTarget, Resource, decode_json

from .signatures import Verifier
from .store import keep, newest
from .worker import Worker


class Event(msgspec.Struct):
    """What every event says; the rest is its type's own."""

    type: str


class Last(msgspec.Struct):
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100


def webhook(verifier: Verifier, worker: Worker) -> type[Resource]:
    class Webhook(Resource):
        """Takes signed events."""

        public = {"create"}  # the signature says who it is

        @staticmethod
        async def post(target: RequestTarget, data: Body, context: Context) -> dict[str, str]:
            """Keep an event; one that comes again is answered as at first, and kept once."""
            body = await data.bytes()
            name = verifier.verify(context.headers, body)
            decode_json(body, Event)
            tx = context.transaction()
            new = await keep(tx, name, decode_json(body, dict[str, Any]), body)
            # Before the worker looks for it.
            await tx.commit()
            if new:
                worker.wake()
            context.status = 202
            return {"id": name}

    return Webhook


def events() -> type[Resource]:
    class Events(Resource):
        """Shows what came."""

        @staticmethod
        async def get(target: RequestTarget[Last], context: Context) -> list[dict[str, Any]]:
            """The newest events, and what became of each."""
            return await newest(context.transaction(), target.query.limit)

    return Events

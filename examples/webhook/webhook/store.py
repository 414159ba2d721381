"""The table of events: each id once, in the order they came."""

import hashlib
import time
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from harperpy import Conflict, Database, Transaction

metadata = sa.MetaData()
events = sa.Table(
    "webhook_events",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String, nullable=False, unique=True),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("event", sa.JSON, nullable=False),
    sa.Column("received", sa.Float, nullable=False),
    sa.Column("state", sa.String, nullable=False, default="received"),
    sa.Column("result", sa.JSON),
)


async def keep(tx: Transaction, name: str, event: Any, body: bytes) -> bool:
    """Whether the event is new. Raises `Conflict` for another one of the same id."""
    digest = hashlib.sha256(body).hexdigest()
    row = {"id": name, "digest": digest, "event": event, "received": time.time()}
    new = insert(events).values(row).on_conflict_do_nothing(index_elements=["id"])
    if await tx.execute(new.returning(events.c.number)):
        return True
    (known,) = await tx.execute(sa.select(events.c.digest).where(events.c.id == name))
    if known["digest"] != digest:
        message = f"webhook-id: {name} came before, with another body"
        raise Conflict(message, param="webhook-id")
    return False


async def newest(tx: Transaction, limit: int) -> list[dict[str, Any]]:
    shown = (events.c.id, events.c.event, events.c.received, events.c.state, events.c.result)
    return await tx.execute(sa.select(*shown).order_by(events.c.number.desc()).limit(limit))


class Store:
    """What the background needs of the table, outside of any request."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    async def open(cls, database: Database) -> Self:
        await database.run(metadata.create_all)
        return cls(database)

    async def next(self) -> tuple[int, Any] | None:
        """Number and event of the oldest that waits."""
        waits = sa.select(events.c.number, events.c.event).where(events.c.state == "received")
        first = waits.order_by(events.c.number).limit(1)
        row = await self._database.read(lambda one: one.execute(first).first())
        return None if row is None else (row.number, row.event)

    async def end(self, number: int, state: str, result: Any) -> None:
        ended = sa.update(events).where(events.c.number == number)
        ended = ended.values(state=state, result=result)
        await self._database.run(lambda one: one.execute(ended))

"""The tables: documents, and their passages with a vector each."""

from __future__ import annotations  # `array[float]` is no type before Python 3.12

import heapq
import math
from array import array
from collections.abc import Sequence
from typing import Any, Self

import msgspec
import sqlalchemy as sa

from harperpy import Database, Transaction

metadata = sa.MetaData()
documents = sa.Table(
    "rag_documents",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("title", sa.String, nullable=False),
)
passages = sa.Table(
    "rag_passages",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("document", sa.ForeignKey("rag_documents.id"), nullable=False, index=True),
    sa.Column("text", sa.String, nullable=False),
    sa.Column("vector", sa.LargeBinary, nullable=False),
)


class Passage(msgspec.Struct):
    """A piece of a document; `likeness` to what was asked is 1 at most."""

    document: int
    title: str
    text: str
    likeness: float


class Store:
    """Writes in the transaction that it is given; searches what is committed, in a thread."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    async def open(cls, database: Database) -> Self:
        await database.run(metadata.create_all)
        return cls(database)

    async def add(
        self,
        tx: Transaction,
        title: str,
        texts: Sequence[str],
        vectors: Sequence[Sequence[float]],
    ) -> int:
        """Keep a document's passages; its id."""
        made = sa.insert(documents).values(title=title).returning(documents.c.id)
        (row,) = await tx.execute(made)
        rows = [
            {"document": row["id"], "text": text, "vector": unit(vector).tobytes()}
            for text, vector in zip(texts, vectors, strict=True)
        ]
        await tx.execute(sa.insert(passages), rows)
        return row["id"]

    async def titles(self, tx: Transaction) -> list[dict[str, Any]]:
        return await tx.execute(sa.select(documents).order_by(documents.c.id))

    async def texts(self, tx: Transaction, document: str) -> list[str]:
        """A document's passages; none if there is no such document."""
        found = sa.select(passages.c.text).where(passages.c.document == document)
        return [row["text"] for row in await tx.execute(found.order_by(passages.c.id))]

    async def remove(self, tx: Transaction, document: str) -> bool:
        """Whether there was such a document."""
        await tx.execute(sa.delete(passages).where(passages.c.document == document))
        gone = sa.delete(documents).where(documents.c.id == document).returning(documents.c.id)
        return bool(await tx.execute(gone))

    async def nearest(self, vector: Sequence[float], count: int) -> list[Passage]:
        """The passages most like it, the likest first; those of another model's size are none.

        Those less than half as like as the first would be cited for nothing.
        """
        asked = unit(vector)
        columns = (passages.c.document, documents.c.title, passages.c.text, passages.c.vector)
        comparable = sa.func.length(passages.c.vector) == len(asked) * asked.itemsize
        all_of_them = sa.select(*columns).join(documents).where(comparable)

        def search(connection: sa.Connection) -> list[Passage]:
            rows = connection.execute(all_of_them)
            found = (Passage(*row[:3], likeness=dot(asked, array("f", row.vector))) for row in rows)
            return heapq.nlargest(count, found, key=lambda passage: passage.likeness)

        likest = await self._database.read(search)
        best = likest[0].likeness if likest else 0.0
        return likest[:1] + [passage for passage in likest[1:] if passage.likeness > best / 2]


def unit(vector: Sequence[float]) -> array[float]:
    """Its direction: of two of these, the product is the cosine."""
    length = math.hypot(*vector) or 1.0
    return array("f", [number / length for number in vector])


def dot(one: array[float], other: array[float]) -> float:
    return sum(left * right for left, right in zip(one, other, strict=True))

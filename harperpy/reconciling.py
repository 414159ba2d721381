"""Whether the rows of the model calls are what an upstream says that it served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import msgspec

Row: TypeAlias = Mapping[str, Any]


class Served(msgspec.Struct, kw_only=True):
    """One request as its upstream noted it.

    `id` is what came as `X-Client-Request-Id`: a row's. Tokens are None where it reported none.
    """

    id: int | str | None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Difference(msgspec.Struct, frozen=True):
    """What two accounts do not agree about; empty where they are the same.

    `missing` were served, and no row says so. `unknown` are ids of successful rows which the
    upstream never saw. `different` says of an id what the row has, and what was served.
    """

    missing: list[Served]
    unknown: list[int]
    different: list[Unequal]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unknown or self.different)


class Unequal(msgspec.Struct, frozen=True):
    """A field in which a row is not what was served; `rows` counts them, and the requests."""

    id: int
    field: str
    row: int | None
    served: int


def difference(rows: Iterable[Row], served: Iterable[Served]) -> Difference:
    """Compare rows of `system.hdb_model_calls` with what an upstream served at the same time.

    Each request is to have exactly one row. A successful row's tokens are to be those that the
    upstream reported; so are those of one that failed, as far as it heard of them: what a call
    that was interrupted or left in the middle took, only the upstream knows.
    """
    asked = list(served)
    times = Counter(str(one.id) for one in asked)
    known: list[Row] = []
    unknown: dict[int, None] = {}
    # There may be millions that nobody asks for.
    for one in rows:
        if str(one["id"]) in times:
            known.append(one)
        elif one["success"]:
            unknown[one["id"]] = None
    by_id = {str(row["id"]): row for row in known}
    counted = Counter(str(row["id"]) for row in known)
    return Difference(
        missing=[one for one in asked if str(one.id) not in by_id],
        unknown=list(unknown),
        different=[
            *(
                Unequal(row["id"], "rows", counted[name], times[name])
                for name, row in by_id.items()
                if (counted[name], times[name]) != (1, 1)
            ),
            *(
                one
                for request in asked
                if (row := by_id.get(str(request.id))) is not None
                for one in _unequal(row, request)
            ),
        ],
    )


def _unequal(row: Row, served: Served) -> Iterable[Unequal]:
    embedded = row["embedding_tokens"]
    prompt = row["prompt_tokens"] if embedded is None else embedded
    pairs = (
        ("prompt_tokens" if embedded is None else "embedding_tokens", prompt, served.prompt_tokens),
        ("completion_tokens", row["completion_tokens"], served.completion_tokens),
    )
    for field, counted, reported in pairs:
        heard = row["success"] or (counted is not None and not row["usage_estimated"])
        if heard and reported is not None and (counted or 0) != reported:
            yield Unequal(row["id"], field, counted, reported)

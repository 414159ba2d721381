"""CSV: flat records as rows, RFC 4180, under a header that the first of them gives."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from .errors import ClientError


class Rows:
    """Makes rows of records, one by one: mappings, Structs or dataclasses of plain values."""

    __slots__ = ("_columns", "_count")

    def __init__(self) -> None:
        self._columns: tuple[str, ...] = ()
        self._count = 0

    def encode(self, record: Any) -> bytes:
        """The record's row, after the header if it is the first.

        Raises `ClientError` 406 for what is not flat, or has a column that the header lacks.
        """
        self._count += 1
        cells = self._cells(record)
        rows: list[Iterable[Any]] = []
        if self._count == 1:
            self._columns = tuple(cells)
            rows.append(self._columns)
        if unknown := cells.keys() - set(self._columns):
            self._refuse(f"the first record has no field {min(unknown)!r}")
        text = io.StringIO()
        rows.append([_text(cells.get(column)) for column in self._columns])
        csv.writer(text).writerows(rows)
        return text.getvalue().encode()

    def _cells(self, record: Any) -> dict[str, Any]:
        if isinstance(record, Mapping):
            record = dict(cast("Mapping[object, object]", record))
        plain: Any = msgspec.to_builtins(record, str_keys=True)
        if not isinstance(plain, dict) or not plain:
            self._refuse(f"it is {type(record).__name__}, not a record with fields")
        cells = cast("dict[str, Any]", plain)
        for name, value in cells.items():
            if isinstance(value, (dict, list)):
                self._refuse(f"its field {name!r} is not a plain value")
        return cells

    def _refuse(self, why: str) -> None:
        message = f"Accept: text/csv takes flat records only; record {self._count}: {why}"
        raise ClientError(message, status=406, code="not_acceptable")


def encode_rows(value: Any) -> bytes:
    """A list of records, or one alone, as a whole CSV."""
    records = cast("Iterable[Any]", value) if isinstance(value, (list, tuple)) else (value,)
    rows = Rows()
    return b"".join(map(rows.encode, records))


def _text(value: Any) -> Any:
    return ("false", "true")[value] if isinstance(value, bool) else value

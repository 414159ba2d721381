"""The wall before the database file: a statement is run behind SQLite's own authorizer.

It trusts nobody: the file is open read-only, and each access that a statement would make is judged
when SQLite prepares it, however the statement is worded.
"""

from __future__ import annotations

import base64
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, TypeAlias

import msgspec

from harperpy import ClientError, HarperError, ServiceUnavailable

Readable: TypeAlias = Mapping[str, Collection[str] | None]
Kind: TypeAlias = Callable[[Any], Any]

# One file by two names: plugins' tables and the server's own.
_ATTACHED = {"system": "ATTACH ? AS system", "data": "ATTACH ? AS data"}
_ALL_TABLES = "SELECT name FROM data.sqlite_master"
# What a thread has taken once stays with the process.
_LITTLE_MEMORY = "PRAGMA system.cache_size = -512; PRAGMA data.cache_size = -512"
_MAX_VALUE_BYTES = 1_000_000
_MAX_PATTERN_BYTES = 100  # LIKE and GLOB try it at each place of a value
_MAX_RESULT_BYTES = 64 * 2**20
_CELL_BYTES = 64  # roughly what a value costs in Python besides its text
_MAX_TEMPORARY_BYTES = 256 * 2**20
_STEPS_BETWEEN_CHECKS = 1000
_SECONDS_BETWEEN_LOOKS = 0.01
_WRITTEN = Path("/proc/thread-self/io")  # Linux; elsewhere time alone is a bound
_ALLOWED_ACTIONS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE})
# Not here: functions that load code, open files, make large values out of nothing (printf) or take
# the square of a value's length (instr, replace, trim): no time limit counts within one call; nor
# those that gather without an end (json_group_array): a value's limit counts when it is whole.
_ALLOWED_FUNCTIONS = frozenset(
    """
    -> ->>
    abs avg ceil ceiling char coalesce concat concat_ws count cume_dist current_date current_time
    current_timestamp date datetime dense_rank exp first_value floor glob group_concat hex ifnull
    iif json json_array json_array_length json_extract json_object json_quote json_type json_valid
    julianday lag last_value lead length like likelihood likely ln log log10 log2 lower max min mod
    nth_value ntile nullif octet_length percent_rank pow power quote random rank round row_number
    sign sqlite_version sqrt strftime string_agg substr substring sum time timediff total trunc
    typeof unicode unixepoch unlikely upper
    """.split()  # noqa: SIM905
)
_CALLERS_FAULTS = frozenset(
    {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE}
)


class NotReadable(Exception):
    """A statement reads a column (both in lower case) that is not open to who asks."""

    def __init__(self, table: str, column: str) -> None:
        super().__init__(f"{table}.{column}")
        self.table = table
        self.column = column


def run_select(
    path: Path,
    sql: str,
    *,
    boolean_columns: frozenset[str],
    hidden_columns: frozenset[tuple[str, str]],
    json_columns: frozenset[str] = frozenset(),
    readable: Readable | None = None,
    max_rows: int = 10_000,
    seconds: float = 5.0,
    left: Event | None = None,
) -> list[dict[str, Any]]:
    """The rows of a statement from `understand`, at most `max_rows`; blocks up to `seconds`.

    It stops soon after `left` is set: nobody waits for it any more.

    `path` is the SQLite file, opened read-only as `system` and as `data`. `hidden_columns` are
    (table, column) pairs that read as NULL wherever they are named. Of the tables of `readable`
    (lower case; None is all) the columns listed there are read, None for all. Result columns named
    in `boolean_columns` turn 0 and 1 into False and True, in `json_columns` text into what it says;
    bytes become base64; a name that comes twice becomes `name_2`.

    Raises ClientError: 400 with SQLite's own words, for a result of more than 64 MiB, or for more
    than 256 MiB of temporary files; 403 for what may not be read or called; 408 when time is up.
    Raises NotReadable for a column outside of `readable`, ServiceUnavailable while the file is
    locked, and sqlite3.Error when the file itself cannot be read.
    """
    _refuse_unseen(sql, hidden_columns, readable or {})
    gate, watch = _Gate(hidden_columns, readable), _Watch(seconds, left)
    try:
        with closing(_open_read_only(path, seconds)) as connection:
            gate.tables = _tables(connection)
            connection.set_authorizer(gate)
            connection.set_progress_handler(watch, _STEPS_BETWEEN_CHECKS)
            cursor = connection.execute(sql)
            names = [column[0] for column in cursor.description or ()]
            kinds = dict.fromkeys(json_columns, _decoded) | dict.fromkeys(boolean_columns, _flag)
            return list(_read_rows(cursor, names, kinds, max_rows))
    except UnicodeEncodeError as error:
        message = "The SQL text is not valid Unicode."
        raise ClientError(message) from error
    except sqlite3.Error as error:
        if gate.unreadable is not None:
            raise NotReadable(*gate.unreadable) from error
        if (refusal := _explain(error, gate.refusal, watch.refusal)) is None:
            raise
        raise refusal from error


def _refuse_unseen(sql: str, hidden_columns: Iterable[tuple[str, str]], readable: Readable) -> None:
    """Raise ClientError if USING, NATURAL or INDEXED may meet a table with hidden columns.

    SQLite does not ask its authorizer about the columns such a join compares, and a FULL JOIN even
    returns them; the name of an index tells that there is one. A keyword or table name cannot be
    spelled in another way, so looking for the words anywhere in the text may refuse too much, never
    too little.
    """
    text = sql.lower()
    if not re.search(r"\b(using|natural|indexed)\b", text):
        return
    limited = {table for table, columns in readable.items() if columns is not None}
    for table in sorted(limited | {table.lower() for table, _ in hidden_columns}):
        if table in text:
            message = f"{table} has columns that SQL may not see: join it with ON."
            raise ClientError(message)


class _Gate:
    """SQLite's authorizer: says for each access OK, IGNORE (read as NULL) or DENY.

    `tables` are the file's, in lower case. `refusal` is the sentence for the first access that was
    denied, `unreadable` the table and column if it is one that others may read.
    """

    def __init__(
        self, hidden_columns: Iterable[tuple[str, str]], readable: Readable | None
    ) -> None:
        self._hidden = {(table.lower(), column.lower()) for table, column in hidden_columns}
        self._readable = readable
        self.tables = frozenset[str]()
        self.refusal: str | None = None
        self.unreadable: tuple[str, str] | None = None

    def __call__(
        self, action: int, first: str | None, second: str | None, database: str | None, _: Any
    ) -> int:
        if action in _ALLOWED_ACTIONS:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_READ:
            return self._read((first or "").lower(), (second or "").lower(), database)
        if action == sqlite3.SQLITE_FUNCTION:
            allowed = (second or "").lower() in _ALLOWED_FUNCTIONS
            return sqlite3.SQLITE_OK if allowed else self._deny(f"the function {second}()")
        return self._deny("anything but reading tables")

    def _read(self, table: str, column: str, database: str | None) -> int:
        # A table of which no column is used is reported with an empty column, often no database.
        if table.startswith("sqlite_") or database not in {*_ATTACHED, None}:
            return self._deny(f"the table {table!r}")
        if self._readable is not None:
            if not column and database is None and table not in self.tables:
                # A name that WITH gives: what stands behind it is asked for as well.
                return sqlite3.SQLITE_OK
            if table not in self._readable:
                return self._deny(f"the table {table!r}")
            columns = self._readable[table]
            # A table of which no column is used is reported with an empty column.
            if columns is not None and column and column not in columns:
                self.unreadable = self.unreadable or (table, column)
                return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_IGNORE if (table, column) in self._hidden else sqlite3.SQLITE_OK

    def _deny(self, what: str) -> int:
        self.refusal = self.refusal or f"Not allowed in SQL here: {what}."
        return sqlite3.SQLITE_DENY


class _Watch:
    """SQLite's progress handler: says when a statement is to stop, and by `refusal` why.

    What a sort does not hold in memory it writes into files without a name, of whatever size, where
    the ledger may want the room: the thread that reads writes nothing else.
    """

    def __init__(self, seconds: float, left: Event | None) -> None:
        self.refusal = _stopped(f"{seconds:g} s", 408)
        self._left = left
        self._look = time.monotonic()
        self._deadline = self._look + seconds
        self._before = _written()

    def __call__(self) -> bool:
        now = time.monotonic()
        if now > self._deadline or (self._left is not None and self._left.is_set()):
            return True
        if now < self._look:
            return False
        self._look = now + _SECONDS_BETWEEN_LOOKS
        if _written() - self._before <= _MAX_TEMPORARY_BYTES:
            return False
        self.refusal = _stopped(f"{_MAX_TEMPORARY_BYTES // 2**20} MiB of temporary data", 400)
        return True


def _stopped(after: str, status: int) -> ClientError:
    message = f"The statement was stopped after {after}: narrow it by WHERE or LIMIT."
    return ClientError(message, status=status)


def _written() -> int:
    """The bytes that this thread has written to files."""
    try:
        return int(_WRITTEN.read_bytes().partition(b"wchar: ")[2].split()[0])
    except OSError:
        return 0


def _open_read_only(path: Path, seconds: float) -> sqlite3.Connection:
    """An empty database in memory with the file attached by both its names, for reading only."""
    connection = sqlite3.connect(":memory:", timeout=seconds, isolation_level=None, uri=True)
    try:
        for statement in _ATTACHED.values():
            connection.execute(statement, (f"{path.absolute().as_uri()}?mode=ro",))
        connection.executescript(_LITTLE_MEMORY)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _MAX_PATTERN_BYTES)
        connection.text_factory = _decode
    except BaseException:
        connection.close()
        raise
    return connection


def _tables(connection: sqlite3.Connection) -> frozenset[str]:
    return frozenset(name.lower() for (name,) in connection.execute(_ALL_TABLES))


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")  # CAST of a blob makes text that is not UTF-8


def _read_rows(
    cursor: sqlite3.Cursor, names: Sequence[str], kinds: Mapping[str, Kind], max_rows: int
) -> Iterator[dict[str, Any]]:
    keys = _unique(names)
    converters = [kinds.get(name, _plain) for name in names]
    decoded = [at for at, convert in enumerate(converters) if convert is _decoded]
    size = 0
    for row in islice(cursor, max_rows):
        size += _CELL_BYTES * len(row) + sum(len(v) for v in row if isinstance(v, str | bytes))
        # Two bytes of JSON may be a list, which takes as much as a cell.
        size += sum(_CELL_BYTES * _parts(row[at]) for at in decoded)
        if size > _MAX_RESULT_BYTES:
            limit = _MAX_RESULT_BYTES // 2**20
            message = f"The result is larger than {limit} MiB: name fewer columns or add a LIMIT."
            raise ClientError(message)
        yield {key: convert(v) for key, v, convert in zip(keys, row, converters, strict=True)}


def _parts(value: Any) -> int:
    """How many lists and maps there are in JSON, at most."""
    return value.count("[") + value.count("{") if isinstance(value, str) else 0


def _unique(names: Sequence[str]) -> list[str]:
    """The names, a repeated one with the first free suffix: `id`, `id_2`, `id_3`."""
    taken, seen = set(names), set[str]()
    keys: list[str] = []
    for name in names:
        key, number = name, 1
        while key in (seen if number == 1 else taken):
            number += 1
            key = f"{name}_{number}"
        seen.add(key)
        taken.add(key)
        keys.append(key)
    return keys


def _plain(value: Any) -> Any:
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else value


def _flag(value: Any) -> Any:
    return bool(value) if value in (0, 1) else _plain(value)


def _decoded(value: Any) -> Any:
    """What a text of JSON says; text that is none, or nested too deeply, as it is."""
    try:
        return msgspec.json.decode(value) if isinstance(value, str) else _plain(value)
    except (msgspec.DecodeError, RecursionError):
        return value


def _explain(error: sqlite3.Error, refusal: str | None, stopped: ClientError) -> HarperError | None:
    """What the caller is told; None for an error of the file itself, which is no answer to them."""
    # Errors of the Python layer (a bind parameter, a second statement) carry no code.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_INTERRUPT:
        return stopped
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        message = "The database is locked by a writer."
        return ServiceUnavailable(message, headers={"Retry-After": "1"})
    if code == sqlite3.SQLITE_CANTOPEN:
        message = "The database is away."
        return ServiceUnavailable(message, headers={"Retry-After": "1"})
    if refusal is not None:
        return ClientError(refusal, status=403)
    if code in _CALLERS_FAULTS:
        return ClientError(f"SQLite does not take the statement: {error}.")
    return None

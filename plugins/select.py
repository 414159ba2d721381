"""One read-only SELECT over the system tables: the text is judged, then run behind a wall.

`rewrite_select` understands the statement (sqlglot), answers with good sentences, and alone decides
on tables and on what would take long to prepare. For writes, hidden columns, functions and time
`run_select` trusts nobody: SQLite's own authorizer decides, on a file that is open read-only.

sqlglot's tree judges, but never writes the text: its generator renames result columns (`count(*)`
becomes `COUNT(*)`, `substr` becomes `SUBSTRING`), drops what it cannot say and turns SELECT INTO
into CREATE TABLE. So the `$` columns are replaced at the places of their tokens, and SQLite reads
every other character as the caller wrote it.

Import this file with the first statement, not at start: sqlglot takes a tenth of a second.
"""

from __future__ import annotations

import base64
import difflib
import re
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from sqlglot import exp, parse_one, tokenize
from sqlglot.errors import ParseError, TokenError
from sqlglot.tokenizer_core import Token

from harperpy import ClientError, HarperError, NotFound, ServiceUnavailable

# Bare names, because a quoted name that is no column of the table would be a *string* to SQLite,
# and the sort by it silently wrong.
_DOLLAR_COLUMNS = {
    "$id": "id",
    "$createdtime": "__createdtime__",
    "$updatedtime": "__updatedtime__",
}
_WRITES = frozenset(
    {"ALTER", "CREATE", "DELETE", "DROP", "INSERT", "MERGE", "REPLACE", "TRUNCATE", "UPDATE"}
)
# SQLite copies a WITH query at each use, before any time limit counts: two uses on each of twenty
# levels are a million copies. These two numbers keep the worst case at some hundred.
_MAX_TABLES = 16
_MAX_CHARACTERS = 20_000
# sqlglot tries `date(` as a type and again as a function, twice the time for each level within:
# 14 levels of parentheses, or many of fewer levels, take a second.
_MAX_NESTING_COST = 2**14
_MAX_VALUE_BYTES = 1_000_000
_MAX_PATTERN_BYTES = 100  # LIKE and GLOB try it at each place of a value
_MAX_RESULT_BYTES = 64 * 2**20
_CELL_BYTES = 64  # roughly what a value costs in Python besides its text
_STEPS_BETWEEN_CHECKS = 1000
_TOO_DEEP = "The SQL text is nested too deeply."

_ALLOWED_ACTIONS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE})
# Not here: functions that load code, open files, make large values out of nothing (printf) or take
# the square of a value's length (instr, replace, trim): no time limit counts within one call.
_ALLOWED_FUNCTIONS = frozenset(
    """
    -> ->>
    abs avg ceil ceiling char coalesce concat concat_ws count cume_dist current_date current_time
    current_timestamp date datetime dense_rank exp first_value floor glob group_concat hex ifnull
    iif json json_array json_array_length json_extract json_group_array json_group_object
    json_object json_quote json_type json_valid julianday lag last_value lead length like likelihood
    likely ln log log10 log2 lower max min mod nth_value ntile nullif octet_length percent_rank pow
    power quote random rank round row_number sign sqlite_version sqrt strftime string_agg substr
    substring sum time timediff total trunc typeof unicode unixepoch unlikely upper
    """.split()  # noqa: SIM905
)
_CALLERS_FAULTS = frozenset(
    {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE}
)


def rewrite_select(sql: str, tables: frozenset[str]) -> str:
    """The text for SQLite of one SELECT over the database `system`.

    `$id`, `$createdtime` and `$updatedtime`, in any case, become the columns they stand for; a
    semicolon or comment at the end is cut off; all else stays as written. `tables` are the names
    (lower case) that may be read, as `system.<table>` or bare.

    Raises ClientError: 403 for a statement that writes, 404 for an unknown table or database, 400
    for any other statement, a bind parameter, a second statement or text that is not understood.
    """
    if len(sql) > _MAX_CHARACTERS:
        message = f"The SQL text is longer than {_MAX_CHARACTERS} characters."
        raise ClientError(message)
    tokens = _read_tokens(sql)
    _refuse_deep_nesting(sql, tokens)
    text = _replace_dollar_columns(sql, tokens)
    _check_tree(_parse(text), tables)
    return text


def run_select(
    path: Path,
    sql: str,
    *,
    boolean_columns: frozenset[str],
    hidden_columns: frozenset[tuple[str, str]],
    max_rows: int = 10_000,
    seconds: float = 5.0,
) -> list[dict[str, Any]]:
    """The rows of a statement from `rewrite_select`, at most `max_rows`; blocks up to `seconds`.

    `path` is the SQLite file, opened read-only as `system`. `hidden_columns` are (table, column)
    pairs that read as NULL wherever they are named. Result columns named in `boolean_columns` turn
    0 and 1 into False and True; bytes become base64; a name that comes twice becomes `name_2`.

    Raises ClientError: 400 with SQLite's own words, or for a result of more than 64 MiB; 403 for
    what may not be read or called; 408 when time is up. Raises ServiceUnavailable while the file is
    locked, and sqlite3.Error when the file itself cannot be read.
    """
    _refuse_unseen_joins(sql, hidden_columns)
    gate = _Gate(hidden_columns)
    try:
        with closing(_open_read_only(path, seconds)) as connection:
            connection.set_authorizer(gate)
            deadline = time.monotonic() + seconds
            connection.set_progress_handler(
                lambda: time.monotonic() > deadline, _STEPS_BETWEEN_CHECKS
            )
            cursor = connection.execute(sql)
            names = [column[0] for column in cursor.description or ()]
            return list(_read_rows(cursor, names, boolean_columns, max_rows))
    except UnicodeEncodeError as error:
        message = "The SQL text is not valid Unicode."
        raise ClientError(message) from error
    except sqlite3.Error as error:
        if (refusal := _explain(error, gate.refusal, seconds)) is None:
            raise
        raise refusal from error


# --- understanding the statement ---


def _read_tokens(sql: str) -> list[Token]:
    """The tokens of the one statement that begins with SELECT or WITH, its end trimmed."""
    try:
        tokens = tokenize(sql, read="sqlite")
    except TokenError as error:
        message = "The SQL text has a quote or a comment that does not end."
        raise ClientError(message) from error
    while tokens and tokens[-1].text == ";":
        tokens.pop()
    if not tokens:
        message = "There is no SQL statement: write one SELECT."
        raise ClientError(message)
    if tokens[0].text.upper() not in {"SELECT", "WITH"}:
        raise _not_a_select(tokens[0].text.upper())
    if any(sql[token.start] == ";" for token in tokens):
        message = "One statement at a time: nothing may follow the semicolon."
        raise ClientError(message)
    return tokens


def _not_a_select(verb: str) -> ClientError:
    if verb in _WRITES:
        message = f"The server keeps the database 'system' itself: {verb} by SQL is not allowed."
        return ClientError(message, status=403)
    return ClientError(f"Only one SELECT statement can be run here, not {verb!r}.")


def _refuse_deep_nesting(sql: str, tokens: Sequence[Token]) -> None:
    depth = cost = 0
    for token in tokens:
        if sql[token.start] == "(":
            depth += 1
            cost += 2**depth
        elif sql[token.start] == ")":
            depth -= 1
        if cost > _MAX_NESTING_COST:
            raise ClientError(_TOO_DEEP)


def _replace_dollar_columns(sql: str, tokens: Sequence[Token]) -> str:
    """The text up to its last token, `$` columns replaced where they stand.

    Strings, quoted names and comments are safe: the first two are tokens that begin with their
    quote, the last are none.
    """
    pieces: list[str] = []
    done = 0
    for token in tokens:
        if sql[token.start] in "$?:@#":
            pieces += [sql[done : token.start], _column_for(sql, token)]
            done = token.end + 1
    pieces.append(sql[done : tokens[-1].end + 1])
    return "".join(pieces)


def _column_for(sql: str, token: Token) -> str:
    column = _DOLLAR_COLUMNS.get(token.text.lower())
    if column is not None:
        return column
    found = re.compile(r"[$?:@#]+[\w$]*").match(sql, token.start)
    name = found[0] if found else token.text
    if name.startswith("$"):
        known = ", ".join(_DOLLAR_COLUMNS)
        message = f"There is no column {name!r}: the columns with a dollar sign are {known}."
    else:
        message = f"{name!r} is a bind parameter, and no values are taken here: write the value."
    raise ClientError(message)


def _parse(text: str) -> exp.Expr:
    try:
        return parse_one(text, read="sqlite")
    except ParseError as error:
        place = error.errors[0] if error.errors else {}
        near = f" near {place['highlight']!r}" if place.get("highlight") else ""
        message = f"The SQL text is not understood{near}."
        raise ClientError(message) from error
    except RecursionError:
        raise ClientError(_TOO_DEEP) from None


def _check_tree(tree: exp.Expr, tables: frozenset[str]) -> None:
    """Raise ClientError unless the tree is SELECTs only, over tables of that list."""
    if not isinstance(tree, exp.Select | exp.SetOperation):
        raise _not_a_select(tree.key.upper())
    count = 0
    for node in tree.walk():
        if isinstance(node, exp.Insert | exp.Update | exp.Delete | exp.Merge | exp.Into):
            verb = "CREATE" if isinstance(node, exp.Into) else node.key.upper()
            raise _not_a_select(verb)
        if isinstance(node, exp.In) and node.args.get("field"):
            message = "IN wants a list or a SELECT in parentheses after it."
            raise ClientError(message)
        if isinstance(node, exp.Table):
            count += 1
            _check_table(node, tables)
    if count > _MAX_TABLES:
        message = f"The statement names tables {count} times; {_MAX_TABLES} is the most."
        raise ClientError(message)


def _check_table(table: exp.Table, tables: frozenset[str]) -> None:
    if not isinstance(table.this, exp.Identifier):
        message = "A function cannot stand where a table is wanted."
        raise ClientError(message)
    database, name = (table.catalog or table.db).lower(), table.name.lower()
    if database not in {"", "system"}:
        message = f"There is no database {database!r} here: SQL reads the database 'system'."
        raise NotFound(message)
    if name in tables or (not database and name in _with_names(table)):
        return
    nearest = difflib.get_close_matches(name, sorted(tables), n=1)
    hint = f": did you mean {nearest[0]!r}?" if nearest else "."
    message = f"There is no table {name!r} in the database 'system'{hint}"
    raise NotFound(message)


def _with_names(table: exp.Table) -> Iterator[str]:
    """The WITH names in scope there: one given elsewhere must not open a real table's name."""
    node = table.parent
    while node is not None:
        if isinstance(node, exp.Query):
            yield from (cte.alias.lower() for cte in node.ctes)
        node = node.parent


# --- running it ---


def _refuse_unseen_joins(sql: str, hidden_columns: Iterable[tuple[str, str]]) -> None:
    """Raise ClientError if USING or NATURAL may meet a table with hidden columns.

    SQLite does not ask its authorizer about the columns such a join compares, and a FULL JOIN even
    returns them. A keyword or table name cannot be spelled in another way, so looking for the words
    anywhere in the text may refuse too much, never too little.
    """
    text = sql.lower()
    if not re.search(r"\b(using|natural)\b", text):
        return
    for table in sorted({table.lower() for table, _ in hidden_columns}):
        if table in text:
            message = f"{table} has columns that SQL may not see: join it with ON."
            raise ClientError(message)


class _Gate:
    """SQLite's authorizer: says for each access OK, IGNORE (read as NULL) or DENY.

    `refusal` is the sentence for the first access that was denied.
    """

    def __init__(self, hidden_columns: Iterable[tuple[str, str]]) -> None:
        self._hidden = {(table.lower(), column.lower()) for table, column in hidden_columns}
        self.refusal: str | None = None

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
        return self._deny("anything but reading the system tables")

    def _read(self, table: str, column: str, database: str | None) -> int:
        # A table of which no column is used is reported with an empty column, often no database.
        if table.startswith("sqlite_") or database not in {"system", None}:
            return self._deny(f"the table {table!r}")
        return sqlite3.SQLITE_IGNORE if (table, column) in self._hidden else sqlite3.SQLITE_OK

    def _deny(self, what: str) -> int:
        self.refusal = self.refusal or f"Not allowed in SQL here: {what}."
        return sqlite3.SQLITE_DENY


def _open_read_only(path: Path, seconds: float) -> sqlite3.Connection:
    """An empty database in memory with the file attached as `system`, for reading only."""
    connection = sqlite3.connect(":memory:", timeout=seconds, isolation_level=None, uri=True)
    try:
        connection.execute("ATTACH ? AS system", (f"{path.absolute().as_uri()}?mode=ro",))
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _MAX_PATTERN_BYTES)
        connection.text_factory = _decode
    except BaseException:
        connection.close()
        raise
    return connection


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")  # CAST of a blob makes text that is not UTF-8


def _read_rows(
    cursor: sqlite3.Cursor, names: Sequence[str], booleans: frozenset[str], max_rows: int
) -> Iterator[dict[str, Any]]:
    keys = _unique(names)
    flags = [name in booleans for name in names]
    size = 0
    for row in islice(cursor, max_rows):
        size += _CELL_BYTES * len(row) + sum(len(v) for v in row if isinstance(v, str | bytes))
        if size > _MAX_RESULT_BYTES:
            limit = _MAX_RESULT_BYTES // 2**20
            message = f"The result is larger than {limit} MiB: name fewer columns or add a LIMIT."
            raise ClientError(message)
        yield {key: _plain(v, flag) for key, v, flag in zip(keys, row, flags, strict=True)}


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


def _plain(value: Any, boolean: bool) -> Any:  # noqa: FBT001
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if boolean and value in (0, 1):
        return bool(value)
    return value


def _explain(error: sqlite3.Error, refusal: str | None, seconds: float) -> HarperError | None:
    """What the caller is told; None for an error of the file itself, which is no answer to them."""
    # Errors of the Python layer (a bind parameter, a second statement) carry no code.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_INTERRUPT:
        message = f"The statement was stopped after {seconds:g} s: narrow it by WHERE or LIMIT."
        return ClientError(message, status=408)
    if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
        message = "The system database is locked by a writer."
        return ServiceUnavailable(message, headers={"Retry-After": "1"})
    if refusal is not None:
        return ClientError(refusal, status=403)
    if code in _CALLERS_FAULTS:
        return ClientError(f"SQLite does not take the statement: {error}.")
    return None

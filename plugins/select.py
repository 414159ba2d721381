"""One read-only SELECT: the text is judged here, then run behind a wall (select_wall.py).

`understand` reads the statement (sqlglot), answers with good sentences, and says which tables it
names, and what would take long to prepare. For tables, columns, functions, writes and time the wall
trusts nobody: SQLite's own authorizer decides, on a file that is open read-only.

sqlglot's tree judges, but never writes the text: its generator renames result columns (`count(*)`
becomes `COUNT(*)`, `substr` becomes `SUBSTRING`), drops what it cannot say and turns SELECT INTO
into CREATE TABLE. So the `$` columns are replaced at the places of their tokens, and SQLite reads
every other character as the caller wrote it.

Import this file with the first statement, not at start: sqlglot takes a tenth of a second.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

import msgspec
from sqlglot import exp, parse_one, tokenize
from sqlglot.errors import ParseError, TokenError
from sqlglot.tokenizer_core import Token

from harperpy import ClientError, NotFound, closest

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
_TOO_DEEP = "The SQL text is nested too deeply."

Known: TypeAlias = Mapping[str, Collection[str]]
"""Database → the names (lower case) of its tables; an empty one counts as not there."""


class Statement(msgspec.Struct, frozen=True):
    """One SELECT. `tables` are its (database, table) pairs, `has_star` is for `*`, not `count(*)`.

    `words` are all its names and keywords in lower case, but no strings.
    """

    text: str
    tables: frozenset[tuple[str, str]]
    has_star: bool
    words: frozenset[str]


class UnknownTable(NotFound):
    """A table or database that is not among those that are known."""

    def __init__(self, message: str, database: str, table: str, *, of_database: bool) -> None:
        super().__init__(message)
        name = f"{database}.{table}" if database else table
        item = f"database '{database}'" if of_database else f"table '{name}'"
        self.item = f"{item} does not exist"


def rewrite_select(sql: str, tables: frozenset[str]) -> str:
    """The text for SQLite of one SELECT over the database `system`, as `understand` has it."""
    return understand(sql, {"system": tables}).text


def understand(sql: str, known: Known, *, quoted_are_names: bool = False) -> Statement:
    """What one SELECT over these tables says, and its text for SQLite.

    `$id`, `$createdtime` and `$updatedtime`, in any case, become the columns they stand for; a
    semicolon or comment at the end is cut off; all else stays as written, unless what stands in
    double quotes is to be a name always: to SQLite it is a string where there is no such column.

    Raises ClientError: 403 for a statement that writes, 404 for an unknown table or database, 400
    for any other statement, a bind parameter, a second statement or text that is not understood.
    """
    if len(sql) > _MAX_CHARACTERS:
        message = f"The SQL text is longer than {_MAX_CHARACTERS} characters."
        raise ClientError(message)
    tokens = _read_tokens(sql)
    _refuse_deep_nesting(sql, tokens)
    text = _replaced(sql, tokens, quoted_are_names=quoted_are_names)
    tree = _parse(text)
    named = frozenset(_check_tree(tree, known))
    words = frozenset(one.text.lower() for one in tokens if sql[one.start] != "'")
    return Statement(text, named, _has_star(tree), words)


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
        message = f"SQL only reads here: {verb} by SQL is not allowed."
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


def _replaced(sql: str, tokens: Sequence[Token], *, quoted_are_names: bool) -> str:
    """The text up to its last token, `$` columns and quotes replaced where they stand.

    Strings, quoted names and comments are safe: the first two are tokens that begin with their
    quote, the last are none.
    """
    pieces: list[str] = []
    done = 0
    for token in tokens:
        if sql[token.start] in "$?:@#":
            pieces += [sql[done : token.start], _column_for(sql, token)]
            done = token.end + 1
        elif sql[token.start] == '"' and quoted_are_names:
            name = token.text.replace("`", "``")
            pieces += [sql[done : token.start], f"`{name}`"]
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


def _has_star(tree: exp.Expr) -> bool:
    return any(not isinstance(star.parent, exp.Count) for star in tree.find_all(exp.Star))


def _check_tree(tree: exp.Expr, known: Known) -> Iterator[tuple[str, str]]:
    """The tables of the tree. Raise ClientError unless it is SELECTs only, over known tables."""
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
            if (database := _database_of(node, known)) is not None:
                yield database, node.name.lower()
    if count > _MAX_TABLES:
        message = f"The statement names tables {count} times; {_MAX_TABLES} is the most."
        raise ClientError(message)


def _database_of(table: exp.Table, known: Known) -> str | None:
    """Where a table is; None for the name of a WITH query."""
    if not isinstance(table.this, exp.Identifier):
        message = "A function cannot stand where a table is wanted."
        raise ClientError(message)
    database, name = (table.catalog or table.db).lower(), table.name.lower()
    if not database and name in _with_names(table):
        return None
    open_ones = [one for one, names in known.items() if names]
    if database and (table.catalog or database not in open_ones):
        listed = " and ".join(f"'{one}'" for one in sorted(open_ones)) or "nothing"
        message = f"There is no database {database!r} here: SQL reads {listed}."
        raise UnknownTable(message, database, name, of_database=True)
    for one in [database] if database else open_ones:
        if name in known[one]:
            return one
    looked = [database] if database else open_ones
    tables = {one for there in looked for one in known[there]}
    near = closest(name, sorted(tables))
    hint = f": did you mean {near!r}?" if near else "."
    where = f" in the database {database!r}" if database else ""
    message = f"There is no table {name!r}{where}{hint}"
    raise UnknownTable(message, database, name, of_database=False)


def _with_names(table: exp.Table) -> Iterator[str]:
    """The WITH names in scope there: one given elsewhere must not open a real table's name."""
    node = table.parent
    while node is not None:
        if isinstance(node, exp.Query):
            yield from (cte.alias.lower() for cte in node.ctes)
        node = node.parent

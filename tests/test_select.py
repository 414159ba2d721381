# ruff: noqa: S608  # SQL put together from text is what this file is about
"""SQL over the system tables: what is understood, what is refused, what no wording can reach."""

import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from harperpy.plugins.select import rewrite_select
from harperpy.plugins.select_wall import run_select

from harperpy import ClientError, ServiceUnavailable

TABLES = frozenset({"hdb_model_calls", "hdb_user", "hdb_role"})
HIDDEN = frozenset({("hdb_user", "password")})
# A value of half a million letters.
LONG = """
WITH RECURSIVE grown(x) AS (SELECT 'x' UNION ALL SELECT x || x FROM grown WHERE length(x) < 500000),
long(x) AS (SELECT max(x) FROM grown)
"""
SCHEMA = """
CREATE TABLE hdb_model_calls (
    id INTEGER PRIMARY KEY, "__createdtime__" REAL, "__updatedtime__" REAL,
    backend TEXT, success BOOLEAN, tokens INTEGER, raw BLOB, "order" TEXT
);
CREATE TABLE hdb_user (username TEXT PRIMARY KEY, password TEXT, role TEXT);
CREATE TABLE hdb_role (id TEXT PRIMARY KEY, role TEXT);
CREATE TABLE journal (id INTEGER PRIMARY KEY, word TEXT);
INSERT INTO hdb_model_calls VALUES
    (1, 30.5, 31.0, 'openai', 1, 10, x'00ff', 'c'),
    (2, 50.5, 51.0, 'openai', 0, 7, NULL, 'a'),
    (3, 60.5, 61.0, 'local', 1, 5, NULL, 'b'),
    (4, 40.5, 41.0, 'openai', NULL, NULL, NULL, '$id');
INSERT INTO hdb_user VALUES ('ann', 'SECRET-1', 'admin'), ('bob', 'SECRET-2', 'guest');
INSERT INTO hdb_role VALUES ('admin', 'Administrator'), ('guest', 'Guest');
INSERT INTO journal VALUES (1, 'inner');
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A small system database, in a folder whose name a URI has to quote."""
    folder = tmp_path / "a b?c#d%20"
    folder.mkdir()
    path = folder / "system.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA)
    return path


def run(path: Path, sql: str, **limits: Any) -> list[dict[str, Any]]:
    """The rows of a statement that has not been looked at: only the wall stands before the file."""
    return run_select(
        path, sql, boolean_columns=frozenset({"success"}), hidden_columns=HIDDEN, **limits
    )


def ask(path: Path, sql: str, **limits: Any) -> list[dict[str, Any]]:
    """The rows of a statement as the operation gets them."""
    return run(path, rewrite_select(sql, TABLES), **limits)


def bytes_of(path: Path) -> bytes:
    """The file's content, to see that it is as it was."""
    return path.read_bytes()


def test_the_newest_call_of_a_backend(database: Path) -> None:
    """The query of the operators' manual answers with the newest row of that backend."""
    rows = ask(
        database,
        "SELECT * FROM system.hdb_model_calls WHERE backend = 'openai'"
        " ORDER BY $createdtime DESC LIMIT 1",
    )

    assert [row["id"] for row in rows] == [2]
    assert rows[0]["__createdtime__"] == 50.5


REWRITTEN = [
    ("SELECT $id FROM hdb_user", "SELECT id FROM hdb_user"),
    (
        "select $ID, $CreatedTime, $UPDATEDTIME from hdb_model_calls",
        "select id, __createdtime__, __updatedtime__ from hdb_model_calls",
    ),
    (
        "SELECT c.$id, `c`.$createdtime, [c].$updatedtime FROM hdb_model_calls AS c",
        "SELECT c.id, `c`.__createdtime__, [c].__updatedtime__ FROM hdb_model_calls AS c",
    ),
    (
        "SELECT system.hdb_model_calls.$id FROM system.hdb_model_calls",
        "SELECT system.hdb_model_calls.id FROM system.hdb_model_calls",
    ),
    (
        "SELECT max($createdtime) FROM hdb_model_calls GROUP BY $id HAVING $id>1 ORDER BY -$id",
        "SELECT max(__createdtime__) FROM hdb_model_calls GROUP BY id HAVING id>1 ORDER BY -id",
    ),
    (
        "SELECT 1 FROM hdb_role JOIN hdb_role r USING ($id)",
        "SELECT 1 FROM hdb_role JOIN hdb_role r USING (id)",
    ),
    (
        "SELECT '😀', $id, '\n', $createdtime\r\nFROM hdb_model_calls",
        "SELECT '😀', id, '\n', __createdtime__\r\nFROM hdb_model_calls",
    ),
    ("SELECT 1;", "SELECT 1"),
    (" SELECT 1 ; ;; -- $nonsense ; DROP", " SELECT 1"),
    ("/* $x */ SELECT 1 -- $y\n + $id", "/* $x */ SELECT 1 -- $y\n + id"),
]


@pytest.mark.parametrize(("sql", "text"), REWRITTEN)
def test_dollar_columns_become_columns(sql: str, text: str) -> None:
    """The three names become columns wherever one may stand; all else stays as it was written."""
    assert rewrite_select(sql, TABLES) == text


UNTOUCHED = [
    "SELECT '$id', 'it''s $foo', '?', ':a', '@b', ';' FROM hdb_user",
    'SELECT "$id", `$id`, [$id], "a""$foo" FROM hdb_user',
    "SELECT 1 /* $foo ? ; /* */ , 2 -- :a ; $id\n FROM hdb_user",
    "SELECT /*+ $foo */ 1",
    "SELECT a$id FROM hdb_user",
    "SELECT json_extract(tokens, '$.id'), raw -> '$.id' FROM hdb_model_calls",
    # what the generator of sqlglot would word differently
    "select count(*), substr('abc', 1, 2), 1/2, 7 == 7, a isnull, 0x1F from hdb_user",
    "SELECT CAST(a AS bigint) FROM hdb_user ORDER BY a DESC NULLS LAST LIMIT 5, 10",
    # every kind of SELECT
    "WITH c AS (SELECT 1 AS x) SELECT x FROM c UNION SELECT 2 EXCEPT SELECT 3 INTERSECT SELECT 4",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c LIMIT 3) SELECT x FROM c",
    "SELECT role, count(*) FROM SYSTEM.HDB_USER GROUP BY role HAVING count(*) > 1 LIMIT 2 OFFSET 1",
    "SELECT * FROM system.hdb_user u LEFT JOIN [system].`hdb_role` r ON u.role = r.id",
    'SELECT * FROM (SELECT * FROM hdb_user) WHERE role IN (SELECT id FROM "hdb_role")',
    "SELECT * FROM hdb_user, hdb_role",
    "SELECT * FROM (WITH c AS (SELECT 1 AS x) SELECT x FROM c)",
    "SELECT sum(tokens) OVER (PARTITION BY backend ORDER BY id) FROM hdb_model_calls",
    "SELECT * FROM (VALUES (1, 2))",
]


@pytest.mark.parametrize("sql", UNTOUCHED)
def test_all_else_stays_as_written(sql: str) -> None:
    """Strings, quoted names, comments and SQL itself reach SQLite letter for letter."""
    assert rewrite_select(sql, TABLES) == sql


REFUSED = [
    # no statement, or none that is understood
    (400, "no SQL statement", ""),
    (400, "no SQL statement", " ; -- nothing"),
    (400, "does not end", "SELECT 'abc"),
    (400, "does not end", "SELECT /* abc"),
    (400, "near 'WHERE'", "SELECT * FROM WHERE"),
    (400, "longer than 20000", "SELECT '" + "x" * 20_000 + "'"),
    (400, "nested too deeply", "SELECT " + "(" * 14 + "1" + ")" * 14),
    (400, "nested too deeply", "SELECT " + "date(" * 30 + "1" + ")" * 30),
    (400, "nested too deeply", "SELECT " + "NOT " * 3000 + "1"),
    # one statement
    (400, "One statement", "SELECT 1; SELECT 2"),
    (400, "One statement", "SELECT 1; DROP TABLE hdb_user"),
    (400, "One statement", "SELECT 1 /* ; */ ; -- ;\n DELETE FROM hdb_user"),
    # that reads
    (403, "INSERT", "INSERT INTO hdb_user VALUES ('eve', 'x', 'admin')"),
    (403, "REPLACE", "REPLACE INTO hdb_user VALUES ('eve', 'x', 'admin')"),
    (403, "UPDATE", "update hdb_user SET password = 'x'"),
    (403, "DELETE", "/* SELECT */ DELETE FROM system.hdb_user"),
    (403, "CREATE", "CREATE TABLE t (a)"),
    (403, "DROP", "DROP TABLE hdb_user"),
    (403, "ALTER", "ALTER TABLE hdb_user ADD COLUMN x"),
    (403, "DELETE", "WITH c AS (SELECT 1) DELETE FROM hdb_user"),
    (403, "INSERT", "WITH c AS (SELECT 1) INSERT INTO hdb_role SELECT 1, 2 FROM c"),
    (403, "DELETE", "WITH c AS (DELETE FROM hdb_user RETURNING *) SELECT * FROM c"),
    (403, "CREATE", "SELECT * INTO copied FROM hdb_user"),
    (400, "'PRAGMA'", "PRAGMA user_version = 7"),
    (400, "'ATTACH'", "ATTACH 'other.db' AS other"),
    (400, "'DETACH'", "DETACH system"),
    (400, "'VACUUM'", "VACUUM INTO 'copy.db'"),
    (400, "'EXPLAIN'", "EXPLAIN SELECT 1"),
    (400, "'BEGIN'", "BEGIN"),
    (400, "'REINDEX'", "REINDEX"),
    (400, "'VALUES'", "VALUES (1)"),
    (400, "'('", "(SELECT 1)"),
    (400, "not understood", "WITH c AS (SELECT 1) VALUES (1)"),
    # values in the text
    (400, "'?'", "SELECT ?"),
    (400, "'?1'", "SELECT * FROM hdb_user WHERE username = ?1"),
    (400, "':name'", "SELECT :name"),
    (400, "'@name'", "SELECT @name"),
    (400, "'$createtime'", "SELECT $createtime FROM hdb_user"),
    (400, "'$id$id'", "SELECT $id$id FROM hdb_user"),
    (400, "'$'", "SELECT $ id FROM hdb_user"),
    # tables
    (404, "'hdb_model_calls'", "SELECT * FROM system.hdb_modelcalls"),
    (404, "no table 'sqlite_master'", "SELECT * FROM sqlite_master"),
    (404, "no table 'sqlite_schema'", "SELECT * FROM system.sqlite_schema"),
    (404, "no table 'journal'", "SELECT * FROM [journal]"),
    (404, "no table 'journal'", "SELECT * FROM `system`.`journal`"),
    (404, "no table 'journal'", "SELECT * FROM 'journal'"),
    (404, "no table 'journal'", "SELECT (SELECT word FROM journal)"),
    (404, "no table 'journal'", "WITH journal AS (SELECT 1) SELECT * FROM system.journal"),
    (
        404,
        "no table 'journal'",
        "SELECT * FROM (WITH journal AS (SELECT 1) SELECT 1 FROM journal), journal",
    ),
    (404, "no database 'data'", "SELECT * FROM data.dog"),
    (404, "no database 'main'", "SELECT * FROM main.sqlite_master"),
    (404, "no database", "SELECT * FROM a.system.hdb_user"),
    (400, "function", "SELECT * FROM pragma_table_info('hdb_user')"),
    (400, "function", "SELECT * FROM json_each('[1]')"),
    (400, "function", "SELECT * FROM hdb_user('x')"),
    (400, "IN wants", "SELECT 1 WHERE 'inner' IN journal"),
    (400, "17 times", "SELECT 1 FROM " + ", ".join(["hdb_user"] * 17)),
]


@pytest.mark.parametrize(("status", "words", "sql"), REFUSED)
def test_what_is_refused(status: int, words: str, sql: str) -> None:
    """All but one SELECT over the known tables is refused in one sentence that names the cause."""
    with pytest.raises(ClientError) as caught:
        rewrite_select(sql, TABLES)

    assert caught.value.status == status
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


ANSWERED: list[tuple[str, list[list[Any]]]] = [
    ("SELECT count(*) AS n, sum(tokens) FROM hdb_model_calls", [[4, 22]]),
    (
        "SELECT backend, count(*) n FROM system.hdb_model_calls GROUP BY backend HAVING n > 1",
        [["openai", 3]],
    ),
    (
        "SELECT username, r.role FROM hdb_user u JOIN hdb_role r ON u.role = r.id LIMIT 1 OFFSET 1",
        [["bob", "Guest"]],
    ),
    (
        "SELECT [order], `order`, $id FROM hdb_model_calls WHERE `order` = '$id'",
        [["$id", "$id", 4]],
    ),
    ("SELECT $id FROM hdb_model_calls WHERE '$createdtime' = \"order\"", []),
    ("SELECT 1/2, 7 % 4, 'a' || 'b', iif(1, 2, 3), '{\"a\":1}' ->> '$.a'", [[0, 3, "ab", 2, 1]]),
    ("SELECT date($createdtime, 'unixepoch') FROM hdb_model_calls WHERE $id = 1", [["1970-01-01"]]),
    ("SELECT 1 UNION SELECT 2 ORDER BY 1 DESC", [[2], [1]]),
    ("SELECT row_number() OVER (ORDER BY $createdtime) FROM hdb_model_calls LIMIT 1", [[1]]),
    ("SELECT raw FROM hdb_model_calls WHERE $id = 1", [["AP8="]]),
    ("SELECT CAST(x'61ff' AS TEXT)", [["a\ufffd"]]),
    (
        "SELECT success FROM hdb_model_calls WHERE $id IN (1, 2, 4) ORDER BY $id",
        [[True], [False], [None]],
    ),
    ("SELECT 7 AS success", [[7]]),
]


@pytest.mark.parametrize(("sql", "values"), ANSWERED)
def test_answers(database: Path, sql: str, values: list[list[Any]]) -> None:
    """Joins, groups, windows and functions work; flags are booleans and bytes base64."""
    rows = ask(database, sql)

    assert [list(row.values()) for row in rows] == values
    assert [[type(v) for v in row.values()] for row in rows] == [
        [type(v) for v in row] for row in values
    ]


def test_columns_keep_the_names_that_were_written(database: Path) -> None:
    """A column is called what the caller called it, a `$` column by its stored name."""
    rows = ask(database, "SELECT count(*), max($createdtime) AS newest FROM hdb_model_calls")

    assert list(rows[0]) == ["count(*)", "newest"]
    assert "__createdtime__" in ask(database, "SELECT c.$createdtime FROM hdb_model_calls c")[0]


def test_a_repeated_column_name_gets_a_suffix(database: Path) -> None:
    """Nothing of a join is lost when two tables share a column's name, or a suffix is taken."""
    joined = "SELECT u.*, r.* FROM hdb_user u JOIN hdb_role r ON r.id = u.role LIMIT 1"

    assert ask(database, joined) == [
        {
            "username": "ann",
            "password": None,
            "role": "admin",
            "id": "admin",
            "role_2": "Administrator",
        }
    ]
    assert ask(database, "SELECT 1 AS a, 2 AS a, 3 AS a_2, 4 AS a, 5 AS a_2") == [
        {"a": 1, "a_3": 2, "a_2": 3, "a_4": 4, "a_2_2": 5}
    ]


def test_a_dollar_column_that_a_table_lacks_is_an_error(database: Path) -> None:
    """It never becomes a constant, by which the rows would be sorted silently wrong."""
    with pytest.raises(ClientError, match="no such column: __createdtime__") as caught:
        ask(database, "SELECT * FROM hdb_user ORDER BY $createdtime")

    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT colour FROM hdb_user", "no such column: colour"),
        ("SELECT shout(1)", "no such function: shout"),
        ("SELECT 1 LIMIT 'x'", "datatype mismatch"),
        (f"{LONG} SELECT x LIKE '%{'a' * 100}%' FROM long", "pattern too complex"),
        (f"{LONG} SELECT hex(x) FROM long", "too big"),
        ("SELECT ?", "bindings"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("SELECT '\ud800'", "not valid Unicode"),
        ("SELECT 1 \0", "null character"),
    ],
)
def test_sqlites_own_complaints_pass_on(database: Path, sql: str, words: str) -> None:
    """What only SQLite can know is wrong is the caller's own doing: 400, and why."""
    with pytest.raises(ClientError) as caught:
        run(database, sql)

    assert caught.value.status == 400
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO system.hdb_user VALUES ('eve', 'x', 'admin')",
        "REPLACE INTO hdb_user VALUES ('ann', 'x', 'admin')",
        "UPDATE hdb_user SET role = 'admin'",
        "DELETE FROM hdb_user",
        "WITH c AS (SELECT 1) DELETE FROM hdb_user",
        "DROP TABLE system.hdb_user",
        "CREATE TABLE system.t (a)",
        "CREATE TABLE t (a)",
        "CREATE TEMP VIEW hdb_role AS SELECT password FROM hdb_user",
        "CREATE VIRTUAL TABLE t USING fts5(a)",
        "ALTER TABLE hdb_user RENAME TO users",
        "PRAGMA writable_schema = ON",
        "PRAGMA query_only = OFF",
        "ATTACH ':memory:' AS other",
        "DETACH system",
        "VACUUM INTO '/tmp/copy-of-system.db'",
        "BEGIN",
        "ANALYZE",
        "REINDEX",
        "SELECT load_extension('x')",
        "SELECT fts3_tokenizer('simple')",
        "SELECT zeroblob(900000)",
        "SELECT printf('%.*c', 900000, 'x')",
        "SELECT format('%.*c', 900000, 'x')",
        "SELECT instr('xxx', 'xy')",
        "SELECT replace('xxx', 'xy', '')",
        "SELECT trim('xxx', 'yx')",
        "SELECT ltrim('xxx', 'yx')",
        "SELECT rtrim('xxx', 'yx')",
        "SELECT json_group_array(username) FROM hdb_user",
        "SELECT json_group_object(username, role) FROM hdb_user",
        "SELECT * FROM sqlite_master",
        "SELECT * FROM sqlite_temp_master",
        "SELECT sql FROM system.sqlite_schema",
        "SELECT count(*) FROM system.sqlite_master",
        "SELECT * FROM pragma_table_info('hdb_user')",
        "SELECT * FROM pragma_database_list",
        "SELECT * FROM json_each('[1]')",
    ],
)
def test_the_wall_alone_lets_nothing_but_reading_pass(database: Path, sql: str) -> None:
    """Even a text that nobody looked at before cannot write, attach, load or see the schema."""
    before = bytes_of(database)

    with pytest.raises(ClientError) as caught:
        run(database, sql)

    assert caught.value.status == 403
    assert "Not allowed in SQL here" in str(caught.value)
    assert bytes_of(database) == before


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM journal",
        "SELECT count(*) FROM hdb_role, system.journal",
        "WITH journal AS (SELECT role FROM hdb_role GROUP BY role) SELECT count(*) FROM journal",
    ],
)
def test_the_wall_alone_does_not_count_what_is_closed(database: Path, sql: str) -> None:
    """A name that WITH gives is taken for the table's, where there is such a table."""
    with pytest.raises(ClientError, match="Not allowed in SQL here: the table 'journal'"):
        run(database, sql, readable={"hdb_role": None})


HIDDEN_READS = [
    "SELECT * FROM hdb_user",
    "SELECT * FROM system.hdb_user",
    "SELECT password FROM hdb_user",
    "SELECT PassWord FROM HDB_USER",
    "SELECT u.[password] AS role, `password`, \"password\" || 'x' FROM hdb_user u",
    "SELECT (SELECT password FROM hdb_user), max(password), group_concat(password) FROM hdb_user",
    "SELECT p FROM (SELECT password AS p FROM hdb_user)",
    "WITH c(x, y, z) AS (SELECT * FROM hdb_user) SELECT y FROM c",
    "SELECT * FROM hdb_user UNION ALL SELECT password, password, password FROM system.hdb_user",
    "SELECT DISTINCT password FROM hdb_user GROUP BY password ORDER BY password",
    "SELECT first_value(password) OVER (ORDER BY password DESC) FROM hdb_user",
    "SELECT coalesce(password, password), hex(password), quote(password) FROM hdb_user",
    "SELECT json_array(password, username) FROM hdb_user",
    "SELECT r.role FROM hdb_role r JOIN hdb_user u ON u.password LIKE 'SECRET%'",
    "SELECT username FROM hdb_user WHERE password = 'SECRET-1'",
    "SELECT username FROM hdb_user WHERE 'SECRET-1' IN (SELECT password FROM hdb_user)",
    "SELECT username FROM hdb_user WHERE ('ann', 'SECRET-1', 'admin') IN hdb_user",
    "SELECT a.username FROM hdb_user a JOIN hdb_user b ON a.password < b.password",
]


@pytest.mark.parametrize("sql", HIDDEN_READS)
def test_a_hidden_column_reads_as_null(database: Path, sql: str) -> None:
    """Neither its value nor a comparison with it gets out, whatever it is called on the way."""
    rows = run(database, sql)

    assert "SECRET" not in str(rows)
    assert "WHERE" not in sql or rows == []
    assert " JOIN " not in sql or rows == []


def test_a_hidden_column_does_not_sort(database: Path) -> None:
    """The order of the rows says nothing about the hidden values."""
    up = run(database, "SELECT username FROM hdb_user ORDER BY password, username")
    down = run(database, "SELECT username FROM hdb_user ORDER BY password DESC, username")

    assert up == down == [{"username": "ann"}, {"username": "bob"}]


@pytest.mark.parametrize(
    "join",
    [
        "FULL JOIN hdb_user USING (password)",
        "FULL JOIN 'hdb_user' using(password)",
        "NATURAL FULL JOIN system.[HDB_USER]",
        "NATURAL JOIN hdb_user",
        "JOIN `hdb_user` USING/**/(password)",
        "FULL JOIN (SELECT * FROM hdb_user) USING (password)",
    ],
)
def test_a_hidden_column_cannot_be_joined_away(database: Path, join: str) -> None:
    """SQLite asks nobody about the columns of USING and NATURAL, so they are refused there."""
    with pytest.raises(ClientError, match="join it with ON") as caught:
        run(database, f"SELECT password FROM (SELECT 'SECRET-1' AS password) {join}")

    assert caught.value.status == 400


def test_tables_without_hidden_columns_join_as_they_like(database: Path) -> None:
    """USING and NATURAL are fine where nothing is hidden."""
    rows = ask(
        database, "SELECT r.role FROM hdb_role r NATURAL JOIN hdb_role JOIN hdb_role USING ($id)"
    )

    assert [row["role"] for row in rows] == ["Administrator", "Guest"]


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT count(*) FROM c",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT x FROM c WHERE x < 0",
        "SELECT count(*) FROM " + ", ".join(f"hdb_model_calls c{n}" for n in range(16)),
        "SELECT c0.id FROM "
        + ", ".join(f"hdb_model_calls c{n}" for n in range(16))
        + " ORDER BY random() LIMIT 1",
    ],
)
def test_what_never_ends_is_stopped(database: Path, sql: str) -> None:
    """Endless recursion and huge joins end with 408 when their time is up."""
    began = time.monotonic()

    with pytest.raises(ClientError, match=r"stopped after 0\.2 s") as caught:
        ask(database, sql, seconds=0.2)

    assert caught.value.status == 408
    assert time.monotonic() - began < 3


def test_nested_with_queries_cannot_multiply(database: Path) -> None:
    """A chain of WITH queries, each read twice, is refused before SQLite copies it 2^20 times."""
    chain = ", ".join(f"c{n} AS (SELECT a.x FROM c{n - 1} a, c{n - 1} b)" for n in range(1, 21))

    with pytest.raises(ClientError, match="names tables 41 times"):
        ask(database, f"WITH c0 AS (SELECT 1 AS x), {chain} SELECT x FROM c20")


def test_no_more_rows_than_allowed(database: Path) -> None:
    """An endless result is read as far as the limit and no further."""
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT x FROM c"

    assert ask(database, endless, max_rows=3) == [{"x": 1}, {"x": 2}, {"x": 3}]
    assert len(ask(database, endless)) == 10_000


def test_no_more_bytes_than_allowed(database: Path) -> None:
    """A result within the row limit is refused once it is too large to hold."""
    wide = f"{LONG} SELECT x FROM hdb_model_calls a, hdb_model_calls b, long"

    with pytest.raises(ClientError, match="larger than 64 MiB") as caught:
        ask(database, f"{wide}, hdb_model_calls c, hdb_model_calls d")

    assert caught.value.status == 400
    assert len(ask(database, wide)) == 16


@pytest.mark.skipif(sys.platform != "linux", reason="nothing tells what a thread has written")
def test_no_more_temporary_bytes_than_allowed(database: Path) -> None:
    """A sort that would fill the disk is refused; one that needs some of it goes on."""
    sort = f"{LONG}, n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT {{}})"
    sort += " SELECT length(x) AS one FROM n, long ORDER BY random(), x"

    with pytest.raises(ClientError, match="stopped after 256 MiB of temporary data") as caught:
        ask(database, sort.format(10**6), seconds=60.0)

    assert caught.value.status == 400
    assert 20 == len(ask(database, sort.format(20), seconds=60.0))


@pytest.fixture
def locked(database: Path) -> Iterator[Path]:
    """The same file while a writer keeps everybody out."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("BEGIN EXCLUSIVE")
        yield database


def test_a_locked_file_is_a_matter_of_a_moment(locked: Path) -> None:
    """The caller is told to come back, after no longer a wait than the statement's time."""
    began = time.monotonic()

    with pytest.raises(ServiceUnavailable) as caught:
        ask(locked, "SELECT * FROM hdb_user", seconds=0.1)

    assert time.monotonic() - began < 3
    assert caught.value.status == 503
    assert caught.value.headers == {"Retry-After": "1"}


def test_reading_goes_on_beside_a_writer(database: Path) -> None:
    """A writer in the middle of its transaction does not keep a reader waiting."""
    with closing(sqlite3.connect(database, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM hdb_role")

        assert ask(database, "SELECT count(*) AS n FROM hdb_role", seconds=0.2) == [{"n": 2}]


def test_a_relative_path_is_taken_from_here(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be named as the operator named its folder."""
    monkeypatch.chdir(database.parent)

    assert ask(Path("system.db"), "SELECT count(*) AS n FROM hdb_user") == [{"n": 2}]


def test_a_broken_file_is_not_the_callers_fault(tmp_path: Path) -> None:
    """A file that is no database stays an internal error."""
    path = tmp_path / "system.db"
    path.write_bytes(b"not a database, but long enough to look into" * 40)

    with pytest.raises(sqlite3.DatabaseError):
        ask(path, "SELECT * FROM hdb_user")


def test_a_file_that_is_away_is_waited_for(tmp_path: Path) -> None:
    """It is a 503, and none is made in its place."""
    path = tmp_path / "system.db"

    with pytest.raises(ServiceUnavailable, match="is away"):
        ask(path, "SELECT * FROM hdb_user")

    assert not path.exists()

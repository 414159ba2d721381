"""Typed contracts: what a verb's annotations and `schemas` promise, held by a running server."""

import datetime as dt
import enum
import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import msgspec
import pytest
from msgspec import UNSET, Meta

from harperpy import (
    SSE,
    Blob,
    Body,
    Context,
    Contract,
    Entry,
    EventStream,
    HarperError,
    RegistrationError,
    RequestTarget,
    Resource,
    Resources,
    Response,
    User,
    json_response,
)
from harperpy.testing import RunningServer, running
from helpers import Answered, ask

T = TypeVar("T")


class Colour(enum.Enum):
    """A choice."""

    RED = "red"
    BLUE = "blue"


class Words(msgspec.Struct, tag="words"):
    """One of two kinds."""

    text: Annotated[str, Meta(min_length=1)]


class Picture(msgspec.Struct, tag="picture"):
    """The other."""

    width: Annotated[int, Meta(ge=0)] = 0


class Note(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """What the verbs below take."""

    title: str
    parts: list[Words | Picture] = []
    counts: dict[str, int] = {}
    boxes: dict[str, Picture] = {}
    by_number: dict[int, str] = {}
    due: dt.date | None = None
    slashed: int = msgspec.field(default=0, name="a/b~c")


class Search(msgspec.Struct):
    """A query; what it does not know is ignored."""

    limit: Annotated[int, Meta(ge=1)] = 10
    tags: list[str] = []
    exact: bool = False
    colour: Colour | None = None
    since: dt.date | None = None


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """A query that refuses what it does not know."""

    q: str


class Page(msgspec.Struct, Generic[T]):
    """A generic answer."""

    items: list[T]


class NotKnown:
    """No type of msgspec's."""


def reached(value: Any) -> dict[str, Any]:
    """What the verbs answer: their type's name, and the value."""
    return {"kind": type(value).__name__, "value": value}


class Typed(Resource):
    """Contracts by annotation alone."""

    public = True

    @staticmethod
    async def get(target: RequestTarget[Search]) -> dict[str, Any]:
        """The query, decoded."""
        return reached(target.query)

    @staticmethod
    async def post(target: RequestTarget, data: Note, context: Context) -> dict[str, Any]:
        """The body, decoded."""
        return reached(data)

    @staticmethod
    def put(target: RequestTarget[Strict], data: "list[Note]") -> dict[str, Any]:
        """Query and body; the annotation is text."""
        return {**reached(data), "q": target.query.q}

    @classmethod
    async def patch(cls, target: RequestTarget, data: Note | None) -> AsyncIterator[Any]:
        """A generator, whose body may be missing."""
        yield reached(data)

    @staticmethod
    def query(target: RequestTarget, data: Strict) -> dict[str, Any]:
        """The QUERY method."""
        return reached(data)


class Said(Resource):
    """Contracts by `schemas` alone."""

    public = True
    schemas: ClassVar = {
        "get": Contract(query=Search, response=list[Note]),
        "post": Contract(body=Note),
        "put": Contract(body=Note),
    }

    @staticmethod
    def get(target):  # noqa: ANN001, ANN205
        """Untyped."""
        return [reached(target.query)]

    @staticmethod
    def post(target, data):  # noqa: ANN001, ANN205
        """Untyped."""
        return reached(data)

    @staticmethod
    async def put(target: RequestTarget, data: Body) -> dict[str, Any]:
        """Reads for itself, so that its contract only documents."""
        return {"kind": type(data).__name__, "value": await data}


class Untyped(Resource):
    """No contract at all."""

    public = True

    @staticmethod
    def post(target, data):  # noqa: ANN001, ANN205
        """Not annotated."""
        return reached(type(data).__name__)

    @staticmethod
    def put(target: RequestTarget, data: Any) -> Any:
        """Any."""
        return reached(type(data).__name__)

    @staticmethod
    def patch(target: RequestTarget, data: Body | None) -> Any:
        """A Body."""
        return reached(type(data).__name__)

    @staticmethod
    def query(target: RequestTarget, data: object) -> Any:
        """An object."""
        return reached(type(data).__name__)


class Shaped(Resource):
    """Refusals in a shape of its own."""

    public = True

    @staticmethod
    def post(target: RequestTarget, data: Note) -> Note:
        """Never reached by what does not fit."""
        return data

    @staticmethod
    def present_error(error: HarperError, context: Context) -> Response:
        """Only the parameter."""
        return json_response(error.status, {"wrong": error.param})


class Closed(Resource):
    """Open to super users only."""

    @staticmethod
    def post(target: RequestTarget, data: Note) -> Note:
        """Never reached by others."""
        return data

    @staticmethod
    def allow_create(user: User | None, target: RequestTarget, context: Context) -> bool:
        """Who is logged in as a super user."""
        return user is not None and user.is_super_user


MOUNTS = {one.__name__: one for one in (Typed, Said, Untyped, Shaped, Closed)}


@pytest.fixture
async def typed() -> AsyncIterator[RunningServer]:
    """A server with the mounts above."""
    async with running(resources=MOUNTS) as server:
        yield server


async def post(server: RunningServer, body: str, path: str = "/Typed", **more: Any) -> Answered:
    """Post this JSON text."""
    headers = {"Content-Type": "application/json", **more.pop("headers", {})}
    return await ask(server, more.pop("method", "POST"), path, data=body, headers=headers, **more)


ACCEPTED = [
    pytest.param('{"title": "a"}', {"title": "a"}, id="the required field alone"),
    pytest.param(
        '{"title": "a", "parts": [{"type": "words", "text": "x"},{"type": "picture", "width": 3}]}',
        {"parts": [{"type": "words", "text": "x"}, {"type": "picture", "width": 3}]},
        id="both kinds of a union",
    ),
    pytest.param('{"title": "a", "due": "2026-01-02"}', {"due": "2026-01-02"}, id="a date"),
    pytest.param('{"title": "a", "due": null}', {"due": None}, id="null where it may stand"),
    pytest.param('{"title": "a", "byNumber": {"1": "x"}}', {"byNumber": {"1": "x"}}, id="renamed"),
]

REFUSED = [
    ("{}", "/title", "Object missing required field `title`", "missing"),
    ('{"title": 1}', "/title", "Expected `str`, got `int`", "wrong type"),
    ('{"title": "a", "more": 1}', "/more", "Object contains unknown field `more`", "unknown"),
    ("[]", "", "Expected `object`, got `array`", "not an object"),
    (
        '{"title": "a", "parts": [{"type": "words", "text": "x"}, {"type": "words"}]}',
        "/parts/1/text",
        "Object missing required field `text`",
        "missing in a list",
    ),
    (
        '{"title": "a", "parts": [{"type": "words", "text": ""}]}',
        "/parts/0/text",
        "Expected `str` of length >= 1",
        "too short",
    ),
    (
        '{"title": "a", "parts": [{"type": "picture", "width": -1}]}',
        "/parts/0/width",
        "Expected `int` >= 0",
        "too small",
    ),
    (
        '{"title": "a", "parts": [{"type": "sound"}]}',
        "/parts/0/type",
        "Invalid value 'sound'",
        "no member of the union",
    ),
    (
        '{"title": "a", "counts": {"b": 1, "c": 2, "x/y~z": "q", "d": "q"}}',
        "/counts/x~1y~0z",
        "Expected `int`, got `str`",
        "a key of a mapping",
    ),
    (
        '{"title": "a", "boxes": {"small": {"type": "picture"}, "big": {"width": "q"}}}',
        "/boxes/big/width",
        "Expected `int`, got `str`",
        "below a key of a mapping",
    ),
    (
        '{"title": "a", "byNumber": {"1": "x", "q": "x"}}',
        "/byNumber/q",
        "Expected `int`, got `str`",
        "a key that does not fit",
    ),
    ('{"title": "a", "a/b~c": "q"}', "/a~1b~0c", "Expected `int`, got `str`", "an escaped name"),
    ('{"title": "a", "due": "soon"}', "/due", "Invalid RFC3339 encoded date", "no date"),
]


@pytest.mark.parametrize(("body", "expected"), ACCEPTED)
async def test_a_body_reaches_the_verb_as_its_type(
    typed: RunningServer, body: str, expected: dict[str, Any]
) -> None:
    """What the annotation names is what the verb is handed."""
    answer = await post(typed, body)

    assert 200 == answer.status
    assert "Note" == answer.json["kind"]
    assert expected.items() <= answer.json["value"].items()


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [pytest.param(*row[:3], id=row[3]) for row in REFUSED],
)
async def test_a_body_that_does_not_fit_is_refused_with_a_pointer(
    typed: RunningServer, body: str, path: str, message: str
) -> None:
    """400 before the verb runs; `errors` says where, as a JSON pointer, and what."""
    answer = await post(typed, body)

    assert 400 == answer.status
    assert [{"path": path, "message": message}] == answer.json["errors"]


async def test_a_long_name_of_a_field_makes_no_long_answer(typed: RunningServer) -> None:
    """It is told several times, and a little that is sent could become very much."""
    answer = await post(typed, '{"title": "a", "' + "more" * 100_000 + '": 1}')

    assert 400 == answer.status
    assert "unknown field `moremore" in answer.text
    assert len(answer.text) < 10_000


@pytest.mark.parametrize(
    ("body", "media", "detail"),
    [
        ("{", "application/json", "the body is not valid JSON: Input data was truncated"),
        ("", "application/json", "expected a JSON body, got an empty one"),
        ("title=a", "text/plain", "Content-Type: expected application/json, got text/plain"),
        (
            '{"title": "a", "counts": {"b": "q"}, ',
            "application/json",
            "counts[...]: Expected `int`, got `str`",
        ),
        ('{"title": "a", "x": ' + "[" * 5000, "application/json", None),
    ],
    ids=["broken", "empty", "another type", "wrong and broken", "nested too deeply"],
)
async def test_what_is_no_json_is_refused(
    typed: RunningServer, body: str, media: str, detail: str | None
) -> None:
    """400 whatever comes, and the sentence says what was expected."""
    answer = await post(typed, body, headers={"Content-Type": media})

    assert 400 == answer.status
    assert detail in (None, answer.json["detail"])


async def test_a_long_mapping_is_searched_for_the_key_that_does_not_fit(
    typed: RunningServer,
) -> None:
    """The first of them is named, whatever the number; beyond a limit none is."""
    counts: dict[str, Any] = {f"k{number}": number for number in range(3000)}
    counts["k1234"] = counts["k2000"] = "q"
    large = {**counts, "padding" * 20_000: 1}

    named = await post(typed, json.dumps({"title": "a", "counts": counts}))
    unnamed = await post(typed, json.dumps({"title": "a", "counts": large}))

    assert "/counts/k1234" == named.json["errors"][0]["path"]
    assert "/counts/..." == unnamed.json["errors"][0]["path"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", {}),
        ("?limit=3", {"limit": 3}),
        ("?tags=a&tags=b%20c", {"tags": ["a", "b c"]}),
        ("?tags=a", {"tags": ["a"]}),
        ("?exact=true", {"exact": True}),
        ("?exact=0", {"exact": False}),
        ("?colour=blue", {"colour": "blue"}),
        ("?since=2026-01-02", {"since": "2026-01-02"}),
        ("?other=1&other=2", {}),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_query_is_decoded_from_text(
    typed: RunningServer, query: str, expected: dict[str, Any], method: str
) -> None:
    """Numbers, flags, choices and lists; what the Struct does not know is ignored."""
    answer = await ask(typed, method, f"/Typed{query}")

    assert 200 == answer.status
    if method == "GET":
        whole = {"limit": 10, "tags": [], "exact": False, "colour": None, "since": None}
        assert {"kind": "Search", "value": {**whole, **expected}} == answer.json


@pytest.mark.parametrize(
    ("query", "path", "message"),
    [
        ("limit=many", "/limit", "Expected `int`, got `str`"),
        ("limit=0", "/limit", "Expected `int` >= 1"),
        ("limit=1&limit=2", "/limit", "Expected one value, got several"),
        ("exact=perhaps", "/exact", "Expected `bool`, got `str`"),
        ("colour=green", "/colour", "Invalid enum value 'green'; expected red, blue"),
    ],
)
async def test_a_query_that_does_not_fit_is_refused_with_a_pointer(
    typed: RunningServer, query: str, path: str, message: str
) -> None:
    """400 with the parameter's name, by HEAD too."""
    answer = await ask(typed, "GET", f"/Typed?{query}")
    head = await ask(typed, "HEAD", f"/Typed?{query}")

    assert (400, 400) == (answer.status, head.status)
    assert [{"path": path, "message": message}] == answer.json["errors"]


@pytest.mark.parametrize(
    ("query", "body", "path"),
    [
        ("", "[]", "/q"),
        ("?q=a&r=b", "[]", "/r"),
        ("?q=a", '[{"title": "a"}, {}]', "/1/title"),
    ],
    ids=["missing", "unknown to a strict query", "the query first, then the body"],
)
async def test_query_and_body_stand_side_by_side(
    typed: RunningServer, query: str, body: str, path: str
) -> None:
    """Each is checked; what the Struct forbids is refused."""
    refused = await post(typed, body, f"/Typed{query}", method="PUT")
    taken = await post(typed, '[{"title": "a"}]', "/Typed?q=a", method="PUT")

    assert (400, path) == (refused.status, refused.json["errors"][0]["path"])
    assert ("list", "a") == (taken.json["kind"], taken.json["q"])


async def test_a_body_may_be_missing_where_none_fits(typed: RunningServer) -> None:
    """`Note | None` takes an empty body as None; a generator is a verb like any other."""
    empty = await ask(typed, "PATCH", "/Typed")
    null = await post(typed, "null", method="PATCH")
    whole = await post(typed, '{"title": "a"}', method="PATCH")

    kinds = [one.json[0]["kind"] for one in (empty, null, whole)]
    assert ["NoneType", "NoneType", "Note"] == kinds


async def test_the_query_method_has_a_typed_body(typed: RunningServer) -> None:
    """QUERY is a verb with a body."""
    fits = await post(typed, '{"q": "a"}', method="QUERY")
    not_ = await post(typed, '{"q": 1}', method="QUERY")

    assert "Strict" == fits.json["kind"]
    assert (400, "/q") == (not_.status, not_.json["errors"][0]["path"])


async def test_schemas_say_what_annotations_do_not(typed: RunningServer) -> None:
    """A Contract decodes for a verb without annotations; `data: Body` reads for itself."""
    got = await ask(typed, "GET", "/Said?limit=3")
    posted = await post(typed, '{"title": "a"}', "/Said")
    refused = await post(typed, "{}", "/Said")
    lazy = await post(typed, '{"no": "note"}', "/Said", method="PUT")

    assert ("Search", 3) == (got.json[0]["kind"], got.json[0]["value"]["limit"])
    assert "Note" == posted.json["kind"]
    assert 400 == refused.status
    assert {"kind": "Body", "value": {"no": "note"}} == lazy.json


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "QUERY"])
async def test_an_untyped_verb_is_handed_the_body_unread(typed: RunningServer, method: str) -> None:
    """No annotation, `Any`, `object` and `Body` mean the same: what came, broken or not."""
    answer = await post(typed, "{broken", "/Untyped", method=method)

    assert {"kind": "str", "value": "Body"} == answer.json


async def test_a_refusal_keeps_the_shape_of_its_mount(typed: RunningServer) -> None:
    """`present_error` words it, from the error's `param`."""
    answer = await post(typed, '{"title": "a", "parts": [{"type": "words"}]}', "/Shaped")

    assert (400, {"wrong": "parts[0].text"}) == (answer.status, answer.json)


@pytest.mark.parametrize(("key", "status"), [("", 401), ("model_user", 403)])
async def test_who_may_not_learns_nothing_of_the_body(
    typed: RunningServer, key: str, status: int
) -> None:
    """Authorisation comes before a body is read: a wrong one is not told apart."""
    credential = await typed.key_for("ada", key) if key else ""

    answers = [await post(typed, body, "/Closed", key=credential) for body in ("{}", "{broken")]
    admitted = await post(typed, "{}", "/Closed")

    assert [status, status] == [answer.status for answer in answers]
    assert ["errors" in answer.json for answer in answers] == [False, False]
    assert 400 == admitted.status


def entry_of(**verbs: Any) -> Entry:
    """A mount of a class with these attributes."""
    schemas = verbs.pop("schemas", {})
    body = {verb: staticmethod(function) for verb, function in verbs.items()}
    resources = Resources()
    resources.set("x", type("Made", (Resource,), {**body, "schemas": schemas}))
    (entry,) = resources
    return entry


def taking(kind: Any) -> Any:
    """A verb whose body is of that kind."""

    def verb(target: RequestTarget, data: Any) -> None: ...

    verb.__annotations__["data"] = kind
    return verb


def asked(kind: Any) -> Any:
    """A verb whose query is of that kind."""

    def verb(target: RequestTarget) -> None: ...

    verb.__annotations__["target"] = RequestTarget[kind]
    return verb


def returning(kind: Any) -> Any:
    """A verb that says it returns that."""

    def verb(target: RequestTarget) -> Any: ...

    verb.__annotations__["return"] = kind
    return verb


class InQuery(msgspec.Struct):
    """Holds what no query can."""

    inner: Note


WRONG = [
    (
        {"post": taking(NotKnown)},
        "NotKnown'> is not supported; expected a msgspec Struct, or types that msgspec knows",
    ),
    (
        {"post": taking(NotKnown)},
        "Made.post: NotKnown cannot be its body: type <class",
    ),
    ({"get": returning(NotKnown)}, "Made.get: NotKnown cannot be its response: "),
    ({"get": returning(list[NotKnown])}, "NotKnown] cannot be its response: "),
    (
        {"post": taking("Elsewhere")},
        "Made.post: the annotation 'Elsewhere' cannot be found when the server runs",
    ),
    ({"get": asked(int)}, "Made.get: int cannot be its query: expected a msgspec Struct"),
    (
        {"get": asked(InQuery)},
        "Made.get: 'inner' of InQuery cannot stand in a query: expected text, numbers",
    ),
    (
        {"post": taking(Note), "schemas": {"post": Contract(body=Search)}},
        "Made.post: its annotations say the body is Note, 'schemas' says Search; say it once",
    ),
    (
        {"get": asked(Search), "schemas": {"get": Contract(query=Strict)}},
        "Made.get: its annotations say the query is Search, 'schemas' says Strict; say it once",
    ),
    (
        {"get": asked(Search), "schemas": {"get": Contract(body=Note)}},
        "Made.get: a get has no body, so its contract cannot name one",
    ),
    (
        {"get": asked(Search), "schemas": {"gett": Contract(query=Search)}},
        "Made.schemas: 'gett' is no verb that the class defines; expected one of get",
    ),
    (
        {"get": asked(Search), "schemas": {"get": Search}},
        "Made.schemas: expected a map of verbs to Contract(...)",
    ),
]


@pytest.mark.parametrize(("verbs", "message"), WRONG)
def test_a_contract_that_cannot_be_is_refused_when_it_is_mounted(
    verbs: dict[str, Any], message: str
) -> None:
    """The sentence names class, verb and type."""
    with pytest.raises(RegistrationError) as refused:
        entry_of(**verbs)

    assert message in str(refused.value)


RETURNED = [
    (Note, Note),
    (None, None),
    ("None", None),
    (Any, UNSET),
    (Response, UNSET),
    (Blob, UNSET),
    (HarperError, UNSET),
    (T, UNSET),
    ("Unheard[of]", UNSET),
    (EventStream, EventStream),
    (AsyncIterator[SSE], EventStream),
    (AsyncIterator[Note], list[Note]),
    (Iterator[Any], UNSET),
    (Note | Response, Note),
    (Note | EventStream, Note),
    (Response | EventStream, EventStream),
    (Note | None, Note | None),
    (Page[Note], Page[Note]),
    (dict[str, Any], dict[str, Any]),
]


@pytest.mark.parametrize(("kind", "expected"), RETURNED, ids=repr)
def test_what_a_verb_returns_tells_what_is_sent(kind: Any, expected: Any) -> None:
    """Values, lists for iterators, events; what harperpy itself understands tells nothing."""
    assert entry_of(get=returning(kind)).contracts["get"].response == expected


def test_names_for_type_checkers_only_do_no_harm() -> None:
    """`target: RequestTarget` and `data: Body` may be imported for type checkers alone."""

    def post(target: Any, data: Any, context: Any) -> None: ...

    post.__annotations__ |= {"target": "Elsewhere", "data": "other.Body | None", "context": "No"}

    assert Contract(response=None) == entry_of(post=post).contracts["post"]

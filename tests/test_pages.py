"""The pages of docs/: their blocks do what the pages say."""

from pathlib import Path

import pytest

from pages import reading

DOCS = Path(__file__).parent.parent / "docs"
# Held to the code by tests of their own; and an index without blocks.
OTHERS = {
    *("openai-compatibility.md", "reference.md", "transactions.md", "README.md"),
    *("tables.md", "content-types.md", "deployment.md", "plugin-options.md"),
}
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OTHERS])
def test_a_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    """From top to bottom its files are written, its commands run and their output compared."""
    with reading(tmp_path) as reader:
        assert reader.follow((DOCS / page).read_text(encoding="utf-8"))


WRONG = {
    "another output": "```console\n$ echo one\ntwo\n```\n",
    "an output that is not shown": "```console\n$ echo one\n```\n",
    "an output that is not there": "```console\n$ true\none\n```\n",
    "a command that fails in silence": "```console\n$ false\n```\n",
    "no command": "```console\necho one\n```\n",
    "a script that fails": "```sh\nfalse\ntrue\n```\n",
    "a program that fails": "```python\nraise ValueError\n```\n",
    "a text that nothing printed": "```sh\necho one\n```\n\n```text\ntwo\n```\n",
    "an unknown language": "```yaml\nno: name\n```\n",
}


@pytest.mark.parametrize("page", WRONG.values(), ids=WRONG)
def test_a_page_that_is_wrong_is_found_out(page: str, tmp_path: Path) -> None:
    """Blocks that do not do what they show fail the test."""
    with reading(tmp_path) as reader, pytest.raises(AssertionError):
        reader.follow(page)


def test_files_keys_and_places_stay(tmp_path: Path) -> None:
    """A page goes on in its folder, with its variables; dots stand for anything."""
    page = """
```text
# kept/a.txt
one
```

```text
# kept/a.txt, continued
two
```

```console
$ cd kept && export WORD=three
$ cat a.txt && echo $WORD
# kept/a.txt
one
...
three
```
"""
    with reading(tmp_path) as reader:
        assert 3 == reader.follow(page)

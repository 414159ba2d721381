"""docs/reference.md: made from the source, and whole."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import harperpy
from harperpy import testing

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    """What `make docs` runs."""
    return runpy.run_path(str(PAGE.with_suffix(".py")))


def test_the_page_is_what_make_docs_writes(generator: dict[str, Any]) -> None:
    """docs/reference.md is as new as the source."""
    assert PAGE.read_text(encoding="utf-8") == generator["page"]()


def test_every_operation_is_on_its_page(generator: dict[str, Any]) -> None:
    """With its parameters and who may run it, in the words of the source."""
    page = PAGE.with_name("operations.md").read_text(encoding="utf-8")

    assert page == generator["operations_page"]()
    assert page.count("\n| `") > 50
    assert "| `get_usage` |" in page


def test_every_name_of_the_face_is_in_one_group(generator: dict[str, Any]) -> None:
    """Each once, and those of `harperpy.testing`; what else there is comes with its module."""
    names = [name for group in generator["GROUPS"].values() for name in group]
    of_tests = {name.partition(".")[2] for name in generator["GROUPS"]["Testing"]}

    assert sorted(harperpy.__all__) == sorted(name for name in names if "." not in name)
    assert set(testing.__all__) <= of_tests


def test_everything_on_the_page_says_what_it_is() -> None:
    """No definition stands without a sentence, no member and no key without words."""
    page = PAGE.read_text(encoding="utf-8")
    entries = re.findall(r"^### (.+)\n\n```python\n(?:.*\n)*?```\n\n(.)", page, re.MULTILINE)

    assert [] == [name for name, begins in entries if begins in "#-"]
    assert [] == re.findall(r"^- `.*`:\s*$", page, re.MULTILINE)
    assert [] == re.findall(r"^\| `.*` \| +\|", page, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    """Each link of a page in docs/ and of the README names a file that is there."""
    root = PAGE.parent.parent
    dead = [
        f"{page.name}: {link}"
        for page in (root / "README.md", *root.glob("docs/**/*.md"))
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]

    assert [] == dead

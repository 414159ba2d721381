"""The pages of docs/: their blocks do what the pages say."""

from pathlib import Path

import pytest

from pages import reading

DOCS = Path(__file__).parent.parent / "docs"
# Held to the code by tests/test_parameters.py, test_reference.py and test_transactions.py; and an
# index without blocks.
OTHERS = {"openai-compatibility.md", "reference.md", "transactions.md", "README.md"}
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OTHERS])
def test_a_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    """From top to bottom its files are written, its commands run and their output compared."""
    with reading(tmp_path) as reader:
        assert reader.follow((DOCS / page).read_text(encoding="utf-8"))

"""The pages of docs/: their blocks do what the pages say."""

from pathlib import Path

import pytest

from pages import reading

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("tutorial.md", "contracts.md", "middleware.md", "streaming.md")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    """From top to bottom its files are written, its commands run and their output compared."""
    with reading(tmp_path) as reader:
        assert reader.follow((DOCS / page).read_text(encoding="utf-8"))

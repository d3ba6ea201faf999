"""What the page on training quotes of errors is what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.docs.pages import ROOT, rows_of

PAGE = ROOT / "docs" / "training.md"


def texts() -> Iterator[str]:
    """What errors say: their golden texts, and the lines of the runtime that make others."""
    for path in sorted((ROOT / "tests").rglob("golden/*.txt")):
        yield path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "runtime").glob("*.py")):
        yield path.read_text(encoding="utf-8")


def test_every_error_on_the_page_is_one_that_is_raised() -> None:
    said = list(texts())
    rows = rows_of(PAGE, "When something goes wrong")
    assert len(rows) >= 10
    for row in rows:
        for quoted in row[0]:
            pieces = map(re.escape, quoted.strip().split("..."))
            pattern = re.compile("[^\\n]*".join(pieces))
            assert any(pattern.search(text) for text in said), quoted

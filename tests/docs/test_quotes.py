"""What pages quote of errors is what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.docs.pages import ROOT, blocks, rows_of

DOCS = ROOT / "docs"


def texts() -> Iterator[str]:
    """What errors say: their golden texts, and the lines of the code that makes others."""
    for path in sorted((ROOT / "tests").rglob("golden/*.txt")):
        yield path.read_text(encoding="utf-8")
    for folder in ("runtime", "src/meshwright/launcher"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.read_text(encoding="utf-8")


def test_every_error_on_the_page_is_one_that_is_raised() -> None:
    said = list(texts())
    rows = rows_of(DOCS / "training.md", "When something goes wrong")
    assert len(rows) >= 10
    for row in rows:
        for quoted in row[0]:
            pieces = map(re.escape, quoted.strip().split("..."))
            pattern = re.compile("[^\\n]*".join(pieces))
            assert any(pattern.search(text) for text in said), quoted


def test_the_failed_run_on_the_page_of_launching_ends_as_one_does() -> None:
    golden = (ROOT / "tests" / "golden" / "launch_raises.txt").read_text(encoding="utf-8")
    (shown,) = [b for b in blocks(DOCS / "launching.md") if b.text.startswith("rank 1 of 2 failed")]
    lines = shown.text.replace("train.py", "script.py").splitlines()
    # With `--logs`; without it this line is not there.
    assert lines.pop(2).startswith("  log: ")
    assert "\n".join(lines) in golden

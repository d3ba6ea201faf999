"""Write a generated page, or compare it with what would be written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def write_or_check(page: Path, text: Callable[[], str], description: str | None) -> int:
    """The command line of a page's generator; the exit code, 1 where `--check` finds another page.

    `text` makes the whole page, once the options have been read.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if it differs"
    )
    check, found = parser.parse_args().check, text()
    if not check:
        page.write_text(found, encoding="utf-8")
        return 0
    differs = found != page.read_text(encoding="utf-8")
    print("the page differs: run this without `--check`" if differs else "the page is up to date")
    return int(differs)

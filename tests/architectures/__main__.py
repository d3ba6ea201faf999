"""Make the table of docs/models.md, or compare the page with what holds now.

python -m tests.architectures                         print the table
python -m tests.architectures llama gpt2              print these rows
python -m tests.architectures --columns tensor,all    only these columns
python -m tests.architectures --write                 write the page
python -m tests.architectures --check                 fail if the page says anything else
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.matrix import COLUMNS, outcome
from tests.architectures.page import PAGE, Row, page, row_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; 1 if something is wrong, or the page is not up to date."""
    options = _options(arguments)
    columns = options.columns.split(",")
    rows: dict[str, Row] = {}
    for name in options.names or ARCHITECTURES:
        rows[name] = {column: outcome(name, column) for column in columns}
        print(row_text(name, rows[name]), flush=True)
        for column, each in rows[name].items():
            if each.word not in ("equal", "–"):
                print(f"\n{name}, {column}: {each.reason}\n", flush=True)
    if options.write:
        PAGE.write_text(page(rows), encoding="utf-8")
    stale = options.check and not _up_to_date(rows)
    return int(stale or any(each.is_wrong for row in rows.values() for each in row.values()))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.architectures")
    parser.add_argument("names", nargs="*", metavar="architecture")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--check", action="store_true", help=f"compare with {PAGE.name}")
    options = parser.parse_args(arguments)
    for unknown in {*options.names} - {*ARCHITECTURES} | {*options.columns.split(",")} - {*COLUMNS}:
        parser.error(f"`{unknown}` is neither an architecture nor a column of {PAGE.name}")
    if (options.write or options.check) and options.columns != ",".join(COLUMNS):
        parser.error("--write and --check take every column")
    if options.write and options.names:
        parser.error("--write takes every architecture")
    return options


def _up_to_date(rows: dict[str, Row]) -> bool:
    """Say which rows the page shows otherwise."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    stale = [name for name, row in rows.items() if row_text(name, row) not in lines]
    for name in stale:
        print(f"{PAGE.name} says otherwise of {name}")
    return not stale


if __name__ == "__main__":
    sys.exit(main())

"""Write `docs/operators.md`: what becomes of every operator of torch's own table.

    python -m docs.make_operators            walk the table, and write the page
    python -m docs.make_operators --check    walk it, and exit with 1 where the page differs

Takes some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.operators import Outcome, label, operators, walk

PAGE = Path(__file__).with_name("operators.md")

REASONS = (
    ("comparing the values of tensors", "compares values"),
    ("by the value of a tensor", "decides by values"),
    ("into a size or a number", "values as sizes"),
    ("depends on the values", "sized by values"),
    ("depend on the values", "sized by values"),
    ("among its results", "nested results"),
    ("gives a sparse tensor", "sparse"),
    ("draws random numbers", "random"),
    ("the backward of", "untraceable backward"),
    ("was not asked for", "large gather"),
)
"""What the text of a refusal holds, and the word for it on the page; the first counts."""


def reason(outcome: Outcome) -> str:
    """The page's word for a refusal."""
    found = [word for sign, word in REASONS if sign in outcome.reason]
    if not found:
        raise LookupError(f"no word for a refusal of {outcome.operator}: {outcome.reason}")
    return found[0]


def row(outcomes: Sequence[Outcome]) -> str:
    """One operator's line of the table."""
    verdicts = Counter(each.verdict for each in outcomes)
    bad = [each for each in outcomes if each.verdict in ("wrong", "foreign")]
    if bad:
        raise LookupError("\n".join(map(str, bad)))
    refused = Counter(reason(each) for each in outcomes if each.verdict == "refused")
    words = ", ".join(f"{word}: {count}" for word, count in sorted(refused.items()))
    return (
        f"| {outcomes[0].operator} | {len(outcomes)} | {verdicts['equal'] or ''} | {words} "
        f"| {verdicts['eager'] or ''} |"
    )


def rows(ops: Iterable[object]) -> list[str]:
    """The lines of these operators."""
    return [row(walk(op)) for op in ops]


def page(lines: Sequence[str]) -> str:
    """The whole page."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    tried, equal, eager = (sum(int(c[i] or 0) for c in cells) for i in (1, 2, 4))
    refused = Counter[str]()
    for each in cells:
        for part in filter(None, each[3].split(", ")):
            word, _, count = part.rpartition(": ")
            refused[word] += int(count)
    listed = "\n".join(f"| refused: {word} | {count} |" for word, count in sorted(refused.items()))
    return _PAGE.format(
        num=len(lines), tried=tried, equal=equal, eager=eager, refused=listed, rows="\n".join(lines)
    )


_PAGE = """\
# Operators

Made by `python -m docs.make_operators`; a test holds it true.

Torch keeps a table of its operators with samples of their arguments, for its own tests. Here each
of its {num} entries that take float64 is the middle of a small model: up to three samples, whose
tensors are values that parameters feed, under five plans. Their batch is split (`dp`), that of the
first alone (`dp + parameters`), their last dim (`tp`) or both (`dp x tp`); or they are parameters
themselves, beside a batch that is split (`parameters`). All that the operator returns enters the
loss. Loss and every gradient are compared with eager mode in float64, and on all ranks. An operator
that draws random numbers is compared with the same program on one rank: no plan may change what it
draws.

| outcome | samples x plans |
| --- | --- |
| tried | {tried} |
| equal | {equal} |
{refused}
| not done by torch itself | {eager} |
| wrong, or another error | 0 |

What the refusals say:
- *compares values*, *decides by values*, *values as sizes*, *sized by values*: a graph has fixed
  sizes and no branches. The help names `torch.where`, masks and capacities.
- *nested results*: lists of tensors within what an operator returns have no type.
- *sparse*: sparse tensors have no layout.
- *untraceable backward*: torch computes the derivative from values that a compiler does not have.
- *large gather*: the operator needs whole what the plan splits, and that is more than 64 KiB a
  step; `allow replicate` accepts it.

*Not done by torch itself* are samples that eager mode refuses (no derivative, no memory to resize),
for which torch's own shape function gives other shapes than the operator, or of which torch's own
derivative is not what finite differences give, while this one is (`as_strided_scatter`).

| operator | tried | equal | refused | not done by torch |
| --- | --- | --- | --- | --- |
{rows}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if it differs"
    )
    check = parser.parse_args().check
    found = []
    for op in operators():
        found.append(row(walk(op)))
        print(f"\r{len(found)} {label(op):40.40}", end="", file=sys.stderr)
    text = page(found)
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    differs = text != PAGE.read_text(encoding="utf-8")
    print("the page differs: run it without --check" if differs else "the page holds")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())

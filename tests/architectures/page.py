"""The page docs/models.md, from the outcome of each architecture in each column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.architectures.catalogue import ARCHITECTURES, SECTIONS
from tests.architectures.matrix import COLUMNS, Outcome

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
Row = Mapping[str, Outcome]

_TOP = """\
# Hugging Face models

Unmodified models of transformers, each built from its configuration class with small sizes (two
layers, narrow, random weights), trained under a plan and compared with the same model in eager
mode: the loss, every gradient and every weight, over two steps. **equal** means that all of them
agree to 1e-6 of a tensor's largest entry in float64, or for those marked f32, which compute most
of it in float32, to 1e-5. Every gather that the plan did not ask for is refused, however small.

| column | statements of the plan | mesh |
| --- | --- | --- |
| data | `data` | `dp=2` |
| tensor | `columns`, `rows`, `shard` | `tp=2` |
| sequence | those of tensor, and `sequence` | `tp=2` |
| vocab | those of tensor, and `vocab` | `tp=2` |
| all | the whole file | `dp=2, tp=2` |

The plans are in [`examples/plans`](../examples/plans). Each is written for its family, not for a
size: copy it, set the mesh, and set the numbers of heads that it names with `let` to the model's.
`python -m tests.architectures llama` runs a row, `--check` compares them all with this page, and
`--write` writes it again.
"""


def page(rows: Mapping[str, Row]) -> str:
    """The text of the page."""
    equal = [
        name
        for name, row in rows.items()
        if all(row[column].word == "equal" for column in COLUMNS if column != "all")
    ]
    lines = [
        _TOP,
        f"{len(equal)} of {len(rows)} equal eager mode in data, tensor, sequence and vocab.",
    ]
    lines += [""]
    for section, names in SECTIONS.items():
        lines += [f"## {section}", "", _cells(["architecture", "class", *COLUMNS])]
        lines += [_cells(["---"] * (2 + len(COLUMNS)))]
        lines += [row_text(name, rows[name]) for name in names] + [""]
    return "\n".join([*lines, *_reasons(rows)]).rstrip() + "\n"


def row_text(name: str, row: Row) -> str:
    """One architecture's line of the table."""
    architecture = ARCHITECTURES[name]
    kind = f"`{architecture.model}`" + ("" if architecture.tolerance < 1e-5 else " f32")
    plan = f"[{name}](../examples/plans/{name}.plan)"
    return _cells([plan, kind, *(each.word for each in row.values())])


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _reasons(rows: Mapping[str, Row]) -> list[str]:
    """For the cells that are not equal, the first line of what each says."""
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        for column, each in row.items():
            if each.reason:
                found.setdefault(f"{column}: {each.reason.splitlines()[0]}", []).append(name)
    if not found:
        return []
    lines = [f"- {reason} ({', '.join(names)})" for reason, names in found.items()]
    return ["## What is not equal, and why", "", *lines]

"""The order of actions of each schedule that a plan can name."""

from __future__ import annotations

import re

import pytest

from meshwright.compiler.schedules.actions import Action
from meshwright.compiler.schedules.named import NAMED
from meshwright.compiler.schedules.tables import B, F, Size, W
from tests.compiler.schedules.worked import TABLES

KINDS = {"F": [F], "B": [B], "W": [W], "D": [B, W]}


def read(text: str, stages: tuple[int, int]) -> tuple[list[Action], list[Action]]:
    """The actions of a row, and the forwards among them that are overlapped."""
    actions: list[Action] = []
    overlapped = []
    for kind, microbatch, joined in re.findall(r"(\w)(\d+)(&?)", text):
        stage = stages[kind.islower()]
        if joined:
            overlapped.append(Action(F, stage, int(microbatch)))
        actions += [Action(each, stage, int(microbatch)) for each in KINDS[kind.upper()]]
    return actions, overlapped


def stages_of(name: str, p: int, r: int) -> tuple[int, int]:
    """The stages of chunk or copy 0 and 1 on coordinate `r`."""
    return r, {"interleaved": r + p, "dualpipe": p - 1 - r}.get(name, 2 * p - 1 - r)


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_the_tables_of_the_papers_come_out_action_by_action(
    case: tuple[str, int, int, int],
) -> None:
    name, p, m, v = case
    table = NAMED[name].fill(Size(p, m, v))
    rows = re.split(r"\n {8}(?=\S)", TABLES[case].rstrip())[1:]
    overlapped = set[Action]()
    for r, (row, text) in enumerate(zip(table.rows, rows, strict=True)):
        expected, pairs = read(text, stages_of(name, p, r))
        assert list(row) == expected, (r, text)
        overlapped |= set(pairs)
    assert table.overlapped == overlapped

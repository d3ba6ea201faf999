"""Programs whose ranks would wait for ever, or compute something else, cannot be made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

import meshwright as mw
from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import Graph, OutputKind, Phase
from meshwright.compiler.schedules.actions import Action, Entry, Receive, Send
from meshwright.compiler.stages import Stage
from tests.models import rows
from tests.runtime.pipelines import Deep

Row = list[Entry]


@cache
def program() -> mw.Program:
    """Two stages on two ranks."""
    plan = "mesh dp=2, pp=2\ndata x over dp\nstages at layers.4 over pp microbatches=4\n"
    return mw.compile(Deep().double(), mw.Plan.parse(plan), rows())


def place(row: Row, kind: type, number: int = 0) -> int:
    """The place of a send or receive, of which there are `number` before."""
    return [i for i, entry in enumerate(row) if type(entry) is kind][number]


def dropped(kind: type) -> Callable[[Row], Any]:
    return lambda row: row.pop(place(row, kind))


def swapped(kind: type) -> Callable[[Row], Any]:
    def change(row: Row) -> None:
        i, j = place(row, kind), place(row, kind, 1)
        row[i], row[j] = row[j], row[i]

    return change


def turned(kind: type) -> Callable[[Row], Any]:
    """To a rank that has nothing to do with it."""

    def change(row: Row) -> None:
        i = place(row, kind)
        row[i] = replace(row[i], peer=1 - row[i].peer)  # type: ignore[call-arg, union-attr]

    return change


def early(row: Row) -> None:
    """A send before its value is made."""
    i = place(row, Send)
    row[i - 1], row[i] = row[i], row[i - 1]


def late(row: Row) -> None:
    """A receive after its value was to be taken."""
    row.append(row.pop(place(row, Receive)))


def doubled(row: Row) -> None:
    row.append(row[place(row, Send)])


MUTATIONS: list[tuple[int, Callable[[Row], Any], str]] = [
    (0, dropped(Send), "`send forward 0 -> forward 1 to 1` on rank 0 of the pipeline is missing"),
    (1, dropped(Send), "`send backward 1 -> backward 0 to 0` on rank 1 .* is missing"),
    (0, dropped(Receive), "`receive backward 1 -> backward 0 from 1` on rank 0 .* is missing"),
    (1, dropped(Receive), "`receive forward 0 -> forward 1 from 0` on rank 1 .* is missing"),
    (0, swapped(Send), "`send forward 0 -> forward 1 of microbatch 1 to 1` .* comes before"),
    (0, swapped(Receive), "`receive backward 1 -> backward 0 from 1` .* comes after `backward"),
    (1, swapped(Receive), "meets `send forward 0 -> forward 1 to 1` of rank 0"),
    (0, turned(Send), "`send forward 0 -> forward 1 to 0` .* is of nothing that goes there"),
    (1, turned(Receive), "`receive forward 0 -> forward 1 from 1` .* is of nothing that goes"),
    (0, early, "`send forward 0 -> forward 1 to 1` .* comes before `forward 0`"),
    (1, late, "`receive forward 0 -> forward 1 from 0` .* comes after `forward 1`"),
    (0, doubled, "`send forward 0 -> forward 1 to 1` on rank 0 of the pipeline runs twice"),
]


@pytest.mark.parametrize(("coordinate", "change", "problem"), MUTATIONS)
def test_a_program_with_other_moves_is_refused_when_it_is_made(
    coordinate: int, change: Callable[[Row], Any], problem: str
) -> None:
    table = program().table
    assert replace(program(), table=replace(table)).entries == program().entries
    changed = list(map(list, table.rows))
    change(changed[coordinate])
    with pytest.raises(PassError, match=problem):
        replace(program(), table=replace(table, rows=tuple(map(tuple, changed))))


def without(kind: OutputKind) -> tuple[Stage, ...]:
    """The stages, of which the first forward does not give what it sends, or saves."""
    first, *others = program().stages
    forward = first.forward
    left = tuple(each for each in forward.outputs if each.kind is not kind)
    return replace(
        first, graphs={**first.graphs, Phase.FORWARD: replace(forward, outputs=left)}
    ), *others


def test_a_program_with_other_graphs_than_its_schedule_is_refused() -> None:
    with pytest.raises(PassError, match="is of nothing that goes there"):
        replace(program(), stages=without(OutputKind.SENT))
    table, into = program().table, (1, Phase.FORWARD)
    rows = (
        tuple(
            each
            for each in row
            if isinstance(each, Action) or (each.link.target, each.link.target_phase) != into
        )
        for row in table.rows
    )
    unsent = replace(table, rows=tuple(rows))
    with pytest.raises(PassError, match=r"stage 1 takes `\w+`, which none sends"):
        replace(program(), stages=without(OutputKind.SENT), table=unsent)
    with pytest.raises(PassError, match="on rank 1 of the pipeline has no graph"):
        replace(program(), stages=program().stages[:1])


def test_a_gradient_that_two_graphs_give_is_refused() -> None:
    first, second = program().stages
    graphs: dict[Phase, Graph] = dict(second.graphs)
    own = next(p for p, graph in graphs.items() if graph.outputs_of(OutputKind.GRADIENT))
    name = program().stages[0].graphs[own].outputs_of(OutputKind.GRADIENT)[0].name
    changed = tuple(
        replace(each, name=name) if each.kind is OutputKind.GRADIENT else each
        for each in graphs[own].outputs
    )
    graphs[own] = replace(graphs[own], outputs=changed)
    with pytest.raises(PassError, match=f"stage 1 makes the gradient `{name}` once more"):
        replace(program(), stages=(first, replace(second, graphs=graphs)))

"""Where a schedule has what stages run once, and what it sends."""

from __future__ import annotations

import pytest

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Link, Receive, Send
from meshwright.compiler.schedules.beside import beside, ends
from meshwright.compiler.schedules.moves import completed
from meshwright.compiler.schedules.named import NAMED
from meshwright.compiler.schedules.routes import LOOPED, chain
from meshwright.compiler.schedules.tables import Size, Table
from tests.compiler.schedules.test_faults import SIZES, complete

F, B, W = LOOPED
BEFORE, AFTER = Phase.BEFORE, Phase.AFTER


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8)])
def test_what_runs_once_is_next_to_the_loop_of_its_stage(name: str, p: int, m: int) -> None:
    """What is before it lets one action of another stage begin in between."""
    table = NAMED[name].fill(Size(p, m, SIZES.get(name, 1)))
    stages = range(len(table.holders))
    graphs = {(stage, phase) for stage in stages for phase in (*LOOPED, BEFORE, AFTER)}
    for row in completed(table, graphs, chain(len(stages))).rows:
        actions = [each for each in row if isinstance(each, Action)]
        loop = [each for each in actions if each.kind in LOOPED]
        for stage in {each.stage for each in actions}:
            own = [i for i, each in enumerate(loop) if each.stage == stage]
            begin, end = (actions.index(Action(kind, stage)) for kind in (BEFORE, AFTER))
            ahead = [each for each in actions[begin:] if each in loop]
            behind = [each for each in actions[:end] if each in loop]
            assert ahead[0] == loop[max(own[0] - 1, 0)]
            assert behind[-1] == loop[own[-1]]


def test_what_waits_for_another_rank_lets_other_stages_pass() -> None:
    """Stage 2 would begin to take a weight of stage 1 that is sent once that has run."""
    rows = ((Action(F, 0), Action(F, 2)), (Action(F, 1),))
    table = Table(1, ((0,), (1,), (0,)), rows)
    links = (Link(0, F, 1, BEFORE), Link(1, BEFORE, 2, BEFORE))
    graphs = {(0, F), (1, F), (2, F), (1, BEFORE), (2, BEFORE)}
    first, _ = completed(table, graphs, links).rows
    assert [each for each in first if isinstance(each, Action)] == [
        Action(F, 0), Action(BEFORE, 2), Action(F, 2)
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_what_is_made_after_the_loop_of_a_stage_is_sent_when_that_of_its_rank_is_over(
    name: str,
) -> None:
    for row in complete(name, 4, 8).rows:
        last = max(i for i, e in enumerate(row) if isinstance(e, Action) and e.kind in LOOPED)
        for place, entry in enumerate(row):
            if isinstance(entry, Send) and entry.link.source_phase is AFTER:
                assert place > last


def test_what_runs_once_ends_before_what_needs_it() -> None:
    given, taken, handed = (
        Link(0, BEFORE, 1, BEFORE),
        Link(1, AFTER, 0, AFTER),
        Link(2, AFTER, 0, AFTER),
    )
    row = (
        Action(BEFORE, 0),
        Action(F, 3),
        Send(given, 0, 1),
        Action(BEFORE, 2),
        Action(F, 0),
        Action(F, 2),
        Action(AFTER, 2),
        Action(B, 3),
        Receive(taken, 0, 1),
        Action(AFTER, 0),
        Action(W, 3),
        Action(AFTER, 3),
    )
    links = (given, taken, handed)
    assert ends(row, links) == {2: (0,), 5: (3,), 9: (6,), 12: (9, 11)}
    assert ends(row, (given, taken)) == {2: (0,), 5: (3,), 12: (6, 9, 11)}
    assert beside([row], links) == {(0, BEFORE), (2, BEFORE), (2, AFTER), (0, AFTER)}
    assert beside([row[:2]], links) == {(0, BEFORE)}
    assert beside([(Action(BEFORE, 0), Action(BEFORE, 1), Action(F, 0))], links) == {(1, BEFORE)}

"""What a stage runs once goes on while its rank runs other stages."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import meshwright as mw
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.routes import LOOPED
from meshwright.passes.bucket import bucketed
from tests.passes.statements.test_zero_stages import FOUR, TWO, Words, words
from tests.runtime.events import actions_during, events_of
from tests.runtime.forked import Forked

PLANS = [
    f"{FOUR} schedule=interleaved\n",
    f"{FOUR} schedule=interleaved\nzero 3 over dp\n",
    f"{FOUR.replace('=4', '=8')} schedule=zbv\nzero 2 over dp\n",
    f"{FOUR} schedule=interleaved\nprecision bf16 reduce=bf16\nzero 1 over dp\n",
    f"{TWO} schedule=dualpipe\nzero 1 over dp\n",
    "mesh dp=2\ndata ids, targets\naccumulate 2\nzero 2 over dp\n",
]
WAYS = ("start", "wait")


@pytest.mark.parametrize("plan", PLANS)
def test_collectives_are_under_way_while_other_stages_run(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of what runs once, with a bucket for each gradient; but for the first stage that a rank
    runs before the loop and the last that it runs after it. Each that starts is awaited once."""
    monkeypatch.setitem(bucketed.__kwdefaults__, "limit", 1)
    torch.manual_seed(0)
    batch = words()
    program = mw.compile(Words(), mw.Plan.parse(plan), batch)
    for events in events_of(program.launch(), batch):
        started, awaited = (Counter(e for what, e in events if what == w) for w in WAYS)
        assert started == awaited and started
        actions = [each for what, each in events if what == "act"]
        first = next(each.stage for each in actions if each.kind in LOOPED)
        last = next(each.stage for each in reversed(actions) if each.kind is Phase.AFTER)
        for action, wire, meanwhile in actions_during(events):
            if wire.kind != "transfer" and action.kind.once:
                edge = first if action.kind is Phase.BEFORE else last
                assert meanwhile or action.stage == edge, (action, wire)


def test_gradients_of_a_stage_are_reduced_before_the_loop_of_a_rank_is_over() -> None:
    torch.manual_seed(0)
    batch = words()
    program = mw.compile(Words().double(), mw.Plan.parse(PLANS[1]), batch)
    first, *_ = events_of(program.launch(), batch)
    places = {each: place for place, (_, each) in enumerate(first)}
    after = next(e for what, e in first if what == "act" and (e.kind, e.stage) == (Phase.AFTER, 2))
    rest = [e for what, e in first[places[after] :] if what == "act"]
    assert {e.stage for e in rest if e.kind in LOOPED} == {0}


def test_processes_do_all_in_the_order_of_the_virtual_mesh(forked: Forked) -> None:
    statements = " schedule=interleaved\nzero 3 over dp\n"
    outputs = forked.outputs("tests.runtime.beside_ranks", 4, statements)
    assert outputs == ["same\n"] * 4

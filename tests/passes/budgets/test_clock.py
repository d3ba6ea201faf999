"""The time of a step on paper, with copies beside what is computed."""

from __future__ import annotations

import pytest

import meshwright
from meshwright.passes.budgets import rates
from meshwright.passes.budgets.choice import Kind, Options, Place, Problem, ordered
from meshwright.passes.budgets.clock import step_time
from tests.models import Gpt, tokens


def test_a_copy_costs_what_computation_does_not_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Gpt(d=64), tokens(batch=16)
    base = "mesh dp=1\n"
    plain, moved = (
        meshwright.compile(model, meshwright.Plan.parse(base + line), batch)
        for line in ("", "offload activations blocks.0\n")
    )
    times = {}
    for rate in (1, 10**6, 2 * 10**6):
        monkeypatch.setattr(rates, "MOVED", rate)
        times[rate] = step_time(moved)
    assert times[1] == step_time(plain)
    # Once nothing hides them, they add up: what leaves and what comes back.
    both = 2 * moved.memory().host
    assert 0.9 * both < (times[2 * 10**6] - times[10**6]) / 10**6 <= both


def test_what_saves_elsewhere_is_chosen_where_waiting_for_it_costs_less() -> None:
    whole, region = Kind(0, (), 90, 100, 0), Kind(1, (), 10, 110, 70)
    for exposed, expected in ((20, (2, 0, 2)), (200, (0, 3, 1))):
        kinds = ordered((whole, region, Kind(0, (), 0, 190, exposed, away=True)))
        found = Problem((Options(0, 4, kinds, 0),), (), (Place({0: 1}, 0),)).best(200)
        assert found is not None and found.counts == (expected,)

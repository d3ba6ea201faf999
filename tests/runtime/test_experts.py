"""Mixtures of experts on real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.experts_ranks import PLANS
from tests.runtime.forked import Forked
from tests.runtime.processes import finish, start


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_experts_train_report_infer_and_delink_on_processes_as_masked_sums(num_ranks: int) -> None:
    processes = start(Path(__file__).parent / "experts_ranks.py", num_ranks, str(num_ranks))
    done = [f"{name} done" for name in PLANS[num_ranks]] + ["delinked"] * (num_ranks == 2)
    for output in finish(processes, 300):
        assert done == output.splitlines()[-len(done) :], output


@pytest.mark.slow
def test_the_experts_of_a_model_are_placed_on_processes(forked: Forked) -> None:
    assert forked.outputs("tests.runtime.placed", 2) == ["done\n"] * 2

"""`run.check` compares what multiple ranks hold copies of, on the virtual mesh."""

from __future__ import annotations

import math

import pytest
import torch

import meshwright as mw
from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.checks.copies import copy_groups
from tests.runtime.models import PLANS, batch, make
from tests.runtime.test_run import compiled

HELP = (
    "  help: give every rank the same inputs and calls; `run.load(...)` makes weights equal again"
)
MOMENT = "the optimizer's `exp_avg` of `blocks.1.up.bias`"


def trained(plan: str = "both") -> tuple[mw.Run, torch.optim.Optimizer]:
    run = compiled(plan, outputs=("logits",)).launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    run.step(*batch())
    optimizer.step()
    return run, optimizer


@pytest.mark.parametrize("plan", PLANS)
def test_copies_are_equal_through_training_and_evaluation(plan: str) -> None:
    run, optimizer = trained(plan)
    run.check(optimizer)
    optimizer.zero_grad()
    run.evaluate(*batch(2))
    run.check(optimizer)
    run.load_state_dict(make(4).state_dict())
    run.check()


def test_each_copy_that_differs_is_named_with_its_ranks_and_the_size_of_the_difference() -> None:
    run, optimizer = trained()
    with torch.no_grad():
        run.states[1].parameters["blocks.0.ln.weight"][0] += 0.5
        run.states[2].parameters["blocks.0.up.weight"][0] -= 0.25
        run.states[3].tensors["buffer", "steps"] += 2
        run.states[3].parameters["blocks.1.ln.bias"].grad += 1
        {output.name: value for output, value in run._results[2].items()}["logits"].add_(8)
    optimizer.state[run.states[2].parameters["blocks.1.up.bias"]]["exp_avg"] += math.nan
    with pytest.raises(mw.RunError) as caught:
        run.check(optimizer)
    lines = str(caught.value).splitlines()
    # The gradient's last digit depends on what it was.
    assert [line for line in lines if "gradient" not in line] == [
        "copies of 6 tensors differ between ranks",
        "  `blocks.0.ln.weight`: rank 1 differs from ranks 0, 2 and 3 by up to 5.0e-01",
        "  `blocks.0.up.weight`: rank 2 differs from rank 0 by up to 2.5e-01",
        "  `steps`: rank 3 differs from ranks 0, 1 and 2 by up to 2.0e+00",
        f"  {MOMENT}: rank 2 differs from rank 0 by up to nan",
        "  the result `output:logits`: rank 2 differs from ranks 0, 1 and 3 by up to 8.0e+00",
        HELP,
    ]
    assert "gradient of `blocks.1.ln.bias`: rank 3 differs from ranks 0, 1 and 2" in str(
        caught.value
    )


def test_copies_of_a_segment_are_compared_where_the_other_segments_are_split() -> None:
    plan = "mesh tp=2\nallow replicate **\nshard blocks.0.up.weight [(48@tp | 16), d]\n"
    run = mw.compile(make(), mw.Plan.parse(plan), batch()).launch()
    run.step(*batch())
    run.check()
    with torch.no_grad():
        run.states[1].parameters["blocks.0.up.weight"][24:] += 0.5
        run.states[1].parameters["blocks.0.up.weight"].grad[25] += 0.25
    with pytest.raises(mw.RunError, match="copies of 2 tensors differ") as caught:
        run.check()
    assert "`blocks.0.up.weight`: rank 1 differs from rank 0 by up to 5.0e-01" in str(caught.value)


def test_a_tolerance_allows_for_small_differences() -> None:
    run, _ = trained()
    with torch.no_grad():
        run.states[1].parameters["blocks.0.ln.weight"][0] += 1e-9
    run.check(tolerance=1e-6)
    with pytest.raises(mw.RunError, match=r"by up to 1\.0e-09"):
        run.check()


def test_a_gradient_that_only_some_ranks_have_is_told() -> None:
    run, _ = trained()
    run.states[3].parameters["blocks.0.ln.weight"].grad = None
    with pytest.raises(mw.RunError, match="the list of gradients and optimizer state: rank 3"):
        run.check()


def test_copies_may_hold_equal_nans_and_zeros_of_either_sign() -> None:
    run, _ = trained()
    with torch.no_grad():
        for state in run.states:
            state.parameters["blocks.0.ln.weight"][0] = float("nan")
            state.parameters["blocks.0.ln.weight"][1] = -0.0 if state.rank else 0.0
            state.parameters["blocks.0.ln.weight"][2:] = 1.0
    run.check()


def test_an_optimizer_of_another_run_is_refused() -> None:
    run, _ = trained()
    with pytest.raises(mw.RunError, match="a parameter that this run does not hold"):
        run.check(torch.optim.SGD(make().parameters(), lr=1.0))


def test_ranks_that_hold_the_same_part_differ_only_in_axes_that_do_not_split_it() -> None:
    mesh = Mesh((("dp", 2), ("tp", 3)))
    assert copy_groups(("tp",), mesh) == ((0, 3), (1, 4), (2, 5))
    assert copy_groups((), mesh) == ((0, 1, 2, 3, 4, 5),)
    assert len(copy_groups(("dp", "tp"), mesh)) == 6

"""Ten optimizer steps under every schedule, held to those of the model itself."""

from __future__ import annotations

import itertools

import pytest
import torch

import meshwright
from tests.equivalence import check_equal
from tests.models import Gpt, tokens
from tests.runtime.forked import Forked
from tests.runtime.pipelines import BESIDE, Tied, plan_of

SCHEDULES = [
    *((name, 1) for name in ("gpipe", "1f1b", "zb", "zbh2")),
    *((name, 2) for name in ("gpipe", "interleaved", "zbv", "dualpipev")),
    ("dualpipe", 1),
]
"""Every schedule, and how many stages a rank has."""
Case = tuple[str, int, int, int, str]
EVERY: list[Case] = [
    (*schedule, stages, microbatches, beside)
    for schedule, stages, microbatches, beside in itertools.product(
        SCHEDULES, (2, 4), (4, 8), BESIDE
    )
    if stages > schedule[1] and (schedule[0] != "dualpipe" or microbatches >= 2 * stages)
]
QUICK: list[Case] = [
    (
        *SCHEDULES[i % 8],
        4 if i % 8 > 3 else (2, 4)[i // 2 % 2],
        (4, 8)[i // 3 % 2],
        list(BESIDE)[i % 5],
    )
    for i in range(12)
]
QUICK.append(("dualpipe", 1, 2, 4, "zero 2"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            each, id="-".join(map(str, each)), marks=[pytest.mark.slow] * (each not in QUICK)
        )
        for each in EVERY
    ],
)
def test_a_pipeline_trains_as_the_model_does(case: Case) -> None:
    torch.manual_seed(0)
    check_equal(Tied(case[2]), lambda: tokens(12, 16, 4), plan_of(*case), steps=10)


def test_dropout_draws_in_stages_what_it_draws_in_one_process() -> None:
    torch.manual_seed(0)
    model, batch = Gpt(p=0.3, layers=4), tokens()
    stages = "stages at blocks.1, blocks.2, blocks.3 over pp virtual=2 schedule=zbv microbatches=4"
    plans = "mesh pp=2\n" + stages, "mesh dp=1\naccumulate 4"
    pipeline, one = (
        meshwright.compile(
            model, meshwright.Plan.parse(f"{plan}\ndata tokens, targets\n"), batch
        ).launch(seed=3)
        for plan in plans
    )
    for _ in range(2):
        assert pipeline.step(*batch).equal(one.step(*batch))
    ours, theirs = pipeline.gradients(), one.gradients()
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_pipeline_of_processes_trains_as_the_model_does(forked: Forked, num_ranks: int) -> None:
    outputs = forked.outputs("tests.runtime.trained_pipelines", num_ranks)
    assert outputs == ["done\n"] * num_ranks

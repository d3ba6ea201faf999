"""Ten optimizer steps under every schedule, held to those of the model itself."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import meshwright
from tests.equivalence import check_equal
from tests.models import Gpt, tokens
from tests.runtime.forked import Forked
from tests.runtime.pipelines import BESIDE, SCHEDULES, Case, Tied, plan_of

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
QUICK += [
    ("dualpipe", 1, 2, 4, "zero 2"),
    ("1f1b", 1, 4, 4, "checkpoint"),
    ("zb", 1, 2, 4, "checkpoint"),
    ("zbv", 2, 4, 4, "checkpoint"),
]


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


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [("two", 2), ("four", 4), pytest.param("more", 4, marks=pytest.mark.slow)],
)
def test_pipelines_of_processes_train_as_the_model_does_and_send_what_their_programs_say(
    forked: Forked, name: str, num_ranks: int
) -> None:
    """Every message from stage to stage is received, in the order and of the size in which it is
    sent."""
    outputs = forked.outputs("tests.runtime.trained_pipeline_ranks", num_ranks, name)
    for every in zip(*map(json.loads, outputs), strict=True):
        sent, received = {}, {}
        for rank, moved in enumerate(every):
            for label, (source, target), left, came in moved:
                assert (left if rank == target else came) == []
                if rank == source:
                    sent[label, source, target] = left
                else:
                    received[label, source, target] = came
        assert sent == received and len(sent) > 1

"""`stages`: the graph is cut into stages that compute what the whole model does."""

from __future__ import annotations

import pytest
import torch

from tests.equivalence import check_equal
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens

TWO = "stages at blocks.1 over pp microbatches=2\n"
SPLIT = f"{GPT_TENSOR}sequence blocks.* over tp\nvocab wte, head over tp\n"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_four_stages_train_a_tied_model_as_one_process_does() -> None:
    plan = "mesh pp=4\nstages at blocks.1, blocks.2, blocks.3 over pp microbatches=4\n"
    program = check_equal(Gpt(layers=4), tokens(), f"{plan}data tokens, targets\n")
    assert [stage.number for stage in program.stages] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "plan",
    [
        "mesh pp=2\nstages at blocks.1 over pp\n",
        "mesh pp=2\nstages at blocks.0.up over pp microbatches=4\ndata tokens, targets\n",
        f"mesh dp=2, pp=2, tp=2\n{TWO}{GPT_DATA}{SPLIT}",
        *(f"mesh dp=2, pp=2\n{TWO}{GPT_DATA}zero {level} over dp\n" for level in (1, 2, 3)),
    ],
    ids=["whole batch", "inside a block", "tensor parallel", "zero 1", "zero 2", "zero 3"],
)
def test_stages_go_with_other_statements(plan: str) -> None:
    check_equal(Gpt(), tokens(), plan)

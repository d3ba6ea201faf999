"""Plans to which `offload` is added, and trainings of equal bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import meshwright
from tests.models import GPT_DATA, GPT_TENSOR

DATA = "mesh dp=2\n" + GPT_DATA
PLANS = {
    "data": DATA,
    "zero 3 in bfloat16": DATA + "zero 3 over dp\nprecision bf16\naccumulate 2\n",
    "all": "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + "vocab wte, head over tp\n"
    "sequence blocks.* over tp\nzero 2 over dp\naccumulate 2\n",
    "half": "mesh tp=2\ndata tokens, targets\naccumulate 4\nprecision fp16\n" + GPT_TENSOR,
}


def compiled(model: nn.Module, plan: str, example: Any) -> meshwright.Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan, "test.plan"), example)


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in found if not found[name].equal(wanted[name])]
    assert not different, different

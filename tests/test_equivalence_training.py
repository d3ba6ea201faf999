"""Training under plans that mix statements is training in one process: losses, norms, weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.runtime.trained import ALONE, PLANS, compiled, train

FAST = ("all, zero over both", "zero 3")


@cache
def alone() -> dict[str, Tensor]:
    return train(compiled(ALONE))


def check_same(found: dict[str, Tensor]) -> None:
    for name, expected in alone().items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in PLANS]
)
def test_twenty_steps_with_dropout_are_those_of_one_process(name: str) -> None:
    check_same(train(compiled(PLANS[name])))

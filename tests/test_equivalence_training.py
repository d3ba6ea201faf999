"""Training under plans that mix statements is training in one process: losses, norms, weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.runtime.forked import Forked, Ranks
from tests.runtime.trained import ALONE, ON_FOUR, PLANS, compiled, train

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


@pytest.mark.slow
def test_four_processes_train_so_and_send_what_their_programs_say(tmp_path: Path) -> None:
    module = "tests.runtime.trained"
    server = Forked(tmp_path, [module])
    try:
        ((_, ended),) = server.run(Ranks(module, 4, seconds=120.0))
    finally:
        server.close()
    assert ended.outputs == ["trained\n"] * 4
    for name in ON_FOUR:
        check_same(torch.load(tmp_path / "cell1" / f"{name}.pt"))

"""Training under plans that mix statements is training in one process: losses, norms, weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tests.runtime.forked import Forked, Ranks
from tests.runtime.trained import ALONE, ON_FOUR, PLANS, VOCAB, compiled, gpt, train

FAST = ("all, zero over both", "zero 3")


class HuggingFace(nn.Module):
    """GPT-2 with its dropout and tied head; its own loss would be in float32."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=16
        )
        self.model = transformers.GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


HUGGING_FACE = """
mesh     dp=2, tp=2
let      heads = 4
data     tokens, targets over dp
columns  model.transformer.h.*.attn.c_attn over tp as (3 heads hd)
rows     model.transformer.h.*.attn.c_proj over tp
columns  model.transformer.h.*.mlp.c_fc    over tp
rows     model.transformer.h.*.mlp.c_proj  over tp
vocab    model.transformer.wte, model.lm_head over tp
sequence model.transformer.h.* over tp
zero 3   over dp
accumulate 2
"""


@cache
def alone(make: Callable[[], nn.Module] = gpt) -> dict[str, Tensor]:
    return train(compiled(ALONE, make))


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in PLANS]
)
def test_twenty_steps_with_dropout_are_those_of_one_process(name: str) -> None:
    check_same(train(compiled(PLANS[name])), alone())


@pytest.mark.slow
def test_twenty_steps_of_a_tied_gpt2_are_those_of_one_process() -> None:
    check_same(train(compiled(HUGGING_FACE, HuggingFace)), alone(HuggingFace))


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
        check_same(torch.load(tmp_path / "cell1" / f"{name}.pt"), alone())

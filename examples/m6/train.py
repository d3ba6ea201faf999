"""The whole recipe on a small model: a pseudo stage, delinking, and the real stage.

The text is a page of this repository's documentation, and both ranks are in this process. Half of
the real model's layers are in host memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import meshwright as mw
from examples.m6.model import M6

TEXT = Path(__file__).parents[2] / "docs" / "training.md"
VOCABULARY, LENGTH, BATCH = 256, 64, 16
PLAN = """
mesh    dp=2
data    tokens, targets over dp
experts blocks.*.mlp over dp count=8 route=prototype top=2
zero    1 over dp
"""
PSEUDO = mw.Plan.parse(f"{PLAN}share blocks.*")
REAL = mw.Plan.parse(f"{PLAN}offload parameters blocks.* fraction=0.5")


@dataclass(frozen=True)
class Recipe:
    """The losses of each stage, and that of one batch before and after delinking."""

    pseudo: list[float]
    before: float
    after: float
    real: list[float]


def train(steps: tuple[int, int], say: Callable[[str], None]) -> Recipe:
    """Train for so many steps in each stage."""
    torch.manual_seed(0)
    model = M6(layers=4, width=64, heads=4, inner=128, vocabulary=VOCABULARY, length=LENGTH)
    for table in (model.wte, model.wpe):
        torch.nn.init.normal_(table.weight, std=0.02)
    generator = torch.Generator().manual_seed(0)
    program = mw.compile(model, PSEUDO, batch(generator))
    _say_size(say, "pseudo", program)
    with program.launch() as run:
        optimizer = run.optimizer(torch.optim.AdamW, lr=3e-3)
        pseudo = _trained(run, optimizer, generator, steps[0], say)
        same = batch(generator)
        before = run.step(*same).item()
        optimizer.zero_grad()
        run, optimizer = run.delink(optimizer, plan=REAL)
        _say_size(say, "real", run.program)
        after = run.step(*same).item()
        optimizer.zero_grad()
        say(f"one batch before delinking {before!r}, after {after!r}")
        real = _trained(run, optimizer, generator, steps[1], say)
    return Recipe(pseudo, before, after, real)


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of the text, and the bytes that follow: two `[batch, length]` tensors."""
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(0, len(text) - LENGTH, (BATCH, 1), generator=generator)
    windows = text[starts + torch.arange(LENGTH + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _trained(
    run: mw.Run,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    steps: int,
    say: Callable[[str], None],
) -> list[float]:
    losses = []
    for step in range(steps):
        loss = run.step(*batch(generator))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            say(f"step {step:3}  loss {losses[-1]:.4f}")
    return losses


def _say_size(say: Callable[[str], None], stage: str, program: mw.Program) -> None:
    count = sum(math.prod(each.type.shape) for each in program.parameters.values())
    say(f"{stage}: {count:,} parameters")

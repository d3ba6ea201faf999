"""Train a GPT with dropout under plans of many kinds; `main` is run by every rank of a test."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import meshwright as mw
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, Indivisible
from tests.runtime.sending import sent_in_a_step
from tests.test_equivalence_huggingface import gpt2, llama

STEPS, ROWS, VOCAB = 20, 16, 48
SEQUENCE, VOCABULARY = "sequence blocks.* over tp\n", "vocab wte, head over tp\n"
ALONE = "mesh one=1\ndata tokens, targets over one\n"
PLANS = {
    "zero 1": f"mesh dp=4\n{GPT_DATA}zero 1 over dp\n",
    "zero 2": f"mesh dp=4\n{GPT_DATA}zero 2 over dp\naccumulate 2\n",
    "zero 3": f"mesh dp=4\n{GPT_DATA}zero 3 over dp\naccumulate 4\n",
    "zero 3 over two": "mesh a=2, b=2\ndata tokens, targets over (a, b)\n"
    "zero 3 over (a, b)\naccumulate 2\n",
    "some modules": f"mesh dp=4\n{GPT_DATA}accumulate 2\n"
    "zero 3 blocks.* over dp\nzero 2 blocks.1.up over dp\nzero 1 wte over dp\n"
    "offload parameters blocks.*\noffload optimizer fraction=0.5\n",
    "tensor, zero 1": f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}zero 1 over dp\naccumulate 2\n",
    "all, zero 2": f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}{SEQUENCE}{VOCABULARY}"
    "zero 2 over dp\naccumulate 4\noffload activations\n",
    "all, zero 3": f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}{SEQUENCE}{VOCABULARY}zero 3 over dp\n",
    "all, zero over both": f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}{SEQUENCE}{VOCABULARY}"
    "zero 2 over (dp, tp)\nzero 3 blocks.0 over dp\naccumulate 2\n"
    f'offload activations blocks.* prefetch=5 to=disk path="{gettempdir()}"\n',
    "no data ranks": f"mesh tp=4\ndata tokens, targets\n{GPT_TENSOR}{SEQUENCE}{VOCABULARY}"
    "zero 3 over tp\naccumulate 4\n"
    f'offload parameters prefetch=3 to=disk path="{gettempdir()}"\n',
    "tensor alone": f"mesh tp=4\ndata tokens, targets\n{GPT_TENSOR}{VOCABULARY}accumulate 2\n",
    "three axes": f"mesh pod=2, dp=2, tp=2\ndata tokens, targets over (pod, dp)\n{GPT_TENSOR}"
    f"{SEQUENCE}zero 2 over dp\naccumulate 2\n",
}
ON_FOUR = ("some modules", "all, zero 2", "all, zero over both", "no data ranks")


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets; the first rows have no label at all, and the others unlike numbers."""
    generator = torch.Generator().manual_seed(number)
    tokens, targets = torch.randint(0, VOCAB, (2, ROWS, 8), generator=generator)
    counts = torch.tensor([0, 0, 0, 0, 8, 1, 0, 3, 1, 1, 8, 8, 7, 2, 0, 5]).roll(4 * number)
    targets[torch.arange(8) >= counts[:, None]] = -100
    return tokens, targets


def gpt() -> nn.Module:
    return Gpt(p=0.1)


@cache
def compiled(plan: str, make: Callable[[], nn.Module] = gpt) -> mw.Program:
    """The program of every rank; forked ranks have it already."""
    torch.manual_seed(0)
    return mw.compile(make().double(), mw.Plan.parse(plan), example=batch(0))


def train(program: mw.Program, steps: int = STEPS) -> dict[str, Tensor]:
    """The losses and norms of some steps of AdamW, and the weights after them."""
    with program.launch(seed=3) as run:
        no_decay = {"params": ["**.bias", "**.ln*.weight"], "weight_decay": 0.0, "lr": 2e-2}
        optimizer = run.optimizer(torch.optim.AdamW, groups=[no_decay], lr=1e-2, weight_decay=0.1)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        found: dict[str, list[Tensor]] = {"losses": [], "norms": []}
        for number in range(steps):
            found["losses"].append(run.step(*batch(number)))
            found["norms"].append(run.clip_grad_norm_(1.0))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        run.check(optimizer)
        results = {name: torch.stack(values) for name, values in found.items()}
        return results | run.state_dict()


TEXT = {"input_ids": torch.zeros(16, 8, dtype=torch.int64)}
TEXT["labels"] = TEXT["input_ids"]
SENT: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "llama": (llama, TEXT, "mesh dp=4\ndata input_ids, labels over dp\nzero {} over dp\n"),
    "tied gpt2": (
        gpt2, TEXT, "mesh a=2, b=2\ndata input_ids, labels over (a, b)\nzero {} over (a, b)\n"
    ),
    "indivisible": (
        Indivisible, (torch.zeros(16, 10),), "mesh dp=4\ndata x over dp\nzero {} over dp\n"
    ),
}  # fmt: skip
"""Models of which ranks count what they send, in two microbatches under each level of `zero`."""


@cache
def sending(name: str, level: int) -> mw.Program:
    """The program of every rank; forked ranks have it already."""
    make, example, plan = SENT[name]
    plan = plan.format(level) + "accumulate 2\n"
    return mw.compile(make(), mw.Plan.parse(plan), example=example)


def check_sent(program: mw.Program, example: Any) -> None:
    """The group sends what the program says, of gathers and scatters to the byte."""
    moved = [each for each in program.comm() if each.kind in ("all_gather", "reduce_scatter")]
    # Besides, labels are counted and the loss is summed up: a few numbers, each sent twice.
    rest = sum(sent_in_a_step(program, example).values())
    rest -= sum(each.bytes * each.times for each in moved)
    assert len(moved) > 3 and 0 <= rest <= 32, rest


def warm_up() -> None:
    """Compile everything before ranks are forked."""
    for name in ON_FOUR:
        compiled(PLANS[name])
    for name in SENT:
        for level in (1, 2, 3):
            sending(name, level)


def main() -> None:
    """Train under each plan of `ON_FOUR`; rank 0 writes what it found into files in `CELL`."""
    torch.set_num_threads(1)
    folder = Path(os.environ["CELL"])
    for name in ON_FOUR:
        found = train(compiled(PLANS[name]))
        if os.environ["RANK"] == "0":
            folder.mkdir(exist_ok=True)
            torch.save(found, folder / f"{name}.pt")
    for name, (_, example, _) in SENT.items():
        for level in (1, 2, 3):
            check_sent(sending(name, level), example)
    print("trained")

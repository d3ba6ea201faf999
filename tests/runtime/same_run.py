"""Run by every process of a test: a run of processes does what the virtual mesh does.

Arguments: a folder that all ranks reach, then names of plans. Every rank builds its model with
another seed; the virtual mesh, beside it in each process, has that of rank 0.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import meshwright as mw
from meshwright.runtime import gloo, run
from tests.runtime.models import BATCH, PLANS, batch, make

RANK = int(os.environ["RANK"])
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
sent: Counter[int] = Counter()
"""Bytes that this rank sent, by the number of its process group."""


class CountedGroup:
    """A process group that counts what it sends; any other call of it fails."""

    def __init__(self, *args: Any) -> None:
        self.group, self.number = _PROCESS_GROUP(*args), CountedGroup.made
        CountedGroup.made += 1

    made = 0

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        sent[self.number] += sum(tensor.nbytes for tensor in tensors)
        return self.group.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        return self.group.recv(tensors, peer, tag)


_PROCESS_GROUP = gloo.ProcessGroupGloo
gloo.ProcessGroupGloo = CountedGroup  # type: ignore[assignment, misc]  # in its place


@contextmanager
def virtual() -> Iterator[None]:
    """Launch inside this on the virtual mesh, though torchrun's variables are there."""
    run.under_torchrun = lambda: False
    try:
        yield
    finally:
        run.under_torchrun = lambda: True


def same(ours: Tensor | Mapping[str, Tensor], theirs: Tensor | Mapping[str, Tensor]) -> None:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11), (ours, theirs)
        return
    assert isinstance(ours, Mapping)
    assert isinstance(theirs, Mapping)
    assert set(ours) == set(theirs)
    for name in ours:
        same(ours[name], theirs[name])


def compiled(plan: str, seed: int, dropout: float = 0.0) -> mw.Program:
    model = make(seed, dropout)
    return mw.compile(model, mw.Plan.parse(PLANS[plan]), example=batch(), outputs=["logits"])


def both_runs(plan: str, dropout: float = 0.0) -> tuple[mw.Run, mw.Run]:
    real = compiled(plan, RANK, dropout).launch(new_shapes="compile", seed=7 + RANK)
    with virtual():
        return real, compiled(plan, 0, dropout).launch(new_shapes="compile", seed=7)


def check_training(plan: str, folder: str) -> None:
    pair = both_runs(plan, dropout=0.2)
    real, other = pair
    same(real.state_dict(), other.state_dict())
    optimizers = [each.optimizer(torch.optim.AdamW, **ADAMW) for each in pair]
    for number in range(3):
        rows = BATCH if number != 1 else 4
        for ours, theirs in zip(*(each.step(*batch(number, rows)) for each in pair), strict=True):
            same(ours, theirs)
        local = real.data_slice(BATCH)
        mine = real.step_local(*(tensor[local] for tensor in batch(9)))
        same(mine[0], other.step(*batch(9))[0])
        same(real.gradients(), other.gradients())
        same(*(each.clip_grad_norm_(0.5) for each in pair))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    same(real.evaluate(*batch(5))[0], other.evaluate(*batch(5))[0])
    same(real.forward(*batch(5)), other.forward(*batch(5)))
    same(real.state_dict(), other.state_dict())
    check_checkpoints(plan, folder, pair, optimizers)


def check_checkpoints(
    plan: str, folder: str, pair: tuple[mw.Run, mw.Run], optimizers: list[torch.optim.Optimizer]
) -> None:
    pair[0].save(f"{folder}/{plan}", optimizers[0])
    pair[0].close()
    with compiled(plan, 5).launch() as fresh:
        optimizer = fresh.optimizer(torch.optim.AdamW, lr=1.0)
        fresh.load(f"{folder}/{plan}", optimizer)
        assert optimizer.param_groups[0]["lr"] == 1e-2
        same(fresh.state_dict(), pair[1].state_dict())
        fresh.load_state_dict(make(6).state_dict())
        model = make(RANK)
        fresh.copy_to(model)
        same(model.state_dict(), make(6).state_dict())


def check_descriptors(plan: str) -> None:
    """A run that is closed leaves little open: the store's connections."""
    program = compiled(plan, 0)
    numbers = []
    for _ in range(4):
        with program.launch() as real:
            real.step(*batch())
        numbers.append(len(os.listdir("/proc/self/fd")))
    assert numbers[-1] - numbers[0] <= 30, numbers


def check_bytes(plan: str) -> None:
    """What the program says that a step moves is what this rank sends, by axes, to the byte."""
    program = compiled(plan, 0)
    os.environ["MESHWRIGHT_SHARED_MEMORY"] = "0"  # what moves through it, no group sends
    with program.launch() as real:
        del os.environ["MESHWRIGHT_SHARED_MEMORY"]
        real.step(*batch())
        sent.clear()
        real.step(*batch())
        lanes = real.transport.process.lanes  # type: ignore[attr-defined]
        numbers = {", ".join(axes): lane.group.backend.number for axes, lane in lanes.items()}
    measured = {axes: sent[number] for axes, number in sorted(numbers.items()) if sent[number]}
    assert measured == program.comm().bytes_by_axis(), (measured, program.comm().counts())
    assert measured
    assert set(sent) <= set(numbers.values())


def check_errors(num_ranks: int) -> None:
    """In words, and on every rank."""
    wide = mw.compile(make(), mw.Plan.parse("mesh tp=8"), example=batch())
    try:
        wide.launch()
    except mw.RunError as error:
        print(error)
    plans = ["mesh tp=%d", "mesh tp=%d\nshard wpe.weight [s, d@tp]"]
    program = mw.compile(make(), mw.Plan.parse(plans[RANK == 1] % num_ranks), example=batch())
    try:
        program.launch()
    except mw.RunError as error:
        print("\n".join(line for line in str(error).splitlines() if "digest" not in line))


if __name__ == "__main__":
    folder, *plans = sys.argv[1:]
    for name in plans:
        check_training(name, folder)
        check_bytes(name)
    check_descriptors(plans[0])
    check_errors(int(os.environ["WORLD_SIZE"]))
    print("done")

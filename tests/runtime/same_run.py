"""Run by every process of a test: a run of processes does what the virtual mesh does.

Arguments: a folder that all ranks reach, then names of plans. Every rank's model has other weights;
the virtual mesh, beside it in each process, has those of rank 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor

import meshwright as mw
from meshwright.runtime.errors import NonFiniteError
from meshwright.runtime.transports import meshes
from tests.runtime.models import BATCH, PLANS, batch, make
from tests.runtime.sending import sent_in_a_step

MODEL = make(dropout=0.2)
"""What every program is compiled from; each rank gives it weights of its own."""
ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


def rank_here() -> int:
    return int(os.environ["RANK"])


@contextmanager
def virtual() -> Iterator[None]:
    """Launch inside this on the virtual mesh, though torchrun's variables are there."""
    meshes.under_torchrun = lambda: False
    try:
        yield
    finally:
        meshes.under_torchrun = lambda: True


def same(ours: Tensor | Mapping[str, Tensor], theirs: Tensor | Mapping[str, Tensor]) -> None:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11), (ours, theirs)
        return
    assert isinstance(ours, Mapping)
    assert isinstance(theirs, Mapping)
    assert set(ours) == set(theirs)
    for name in ours:
        same(ours[name], theirs[name])


@cache
def compiled(plan: str) -> mw.Program:
    """The program of every rank; forked ranks have it already."""
    return mw.compile(MODEL, mw.Plan.parse(plan), example=batch(), outputs=["logits"])


@cache
def scaled(plan: str) -> mw.Program:
    """The same with its loss scaled."""
    plan += "precision fp16\n"
    return mw.compile(make().float(), mw.Plan.parse(plan), example=batch())


def check_training(program: mw.Program, folder: str, *, more: bool) -> None:
    """Three steps; with `more` also what compiles anew, for other shapes and modes."""
    real = program.launch(new_shapes="compile", seed=7 + rank_here())
    with virtual():
        other = program.launch(new_shapes="compile", seed=7, state_dict=make(0).state_dict())
    pair = (real, other)
    same(real.state_dict(), other.state_dict())
    optimizers = [each.optimizer(torch.optim.AdamW, **ADAMW) for each in pair]
    for number in range(3):
        rows = 4 if more and number == 1 else BATCH
        for ours, theirs in zip(*(each.step(*batch(number, rows)) for each in pair), strict=True):
            same(ours, theirs)
        local = real.data_slice(BATCH)
        mine = real.step_local(*(tensor[local] for tensor in batch(9)))
        same(mine[0], other.step(*batch(9))[0])
        same(real.gradients(), other.gradients())
        same(*(each.clip_grad_norm_(0.5) for each in pair))
        for each, optimizer in zip(pair, optimizers, strict=True):
            optimizer.step()
            each.check(optimizer)
            optimizer.zero_grad()
    if more:
        same(real.evaluate(*batch(5))[0], other.evaluate(*batch(5))[0])
        same(real.forward(*batch(5)), other.forward(*batch(5)))
    same(real.state_dict(), other.state_dict())
    real.save(folder, optimizers[0])
    real.close()
    check_checkpoint(program, folder, other.state_dict())


def check_checkpoint(program: mw.Program, folder: str, expected: dict[str, Tensor]) -> None:
    with program.launch() as real:
        optimizer = real.optimizer(torch.optim.AdamW, lr=1.0)
        real.load(folder, optimizer)
        assert optimizer.param_groups[0]["lr"] == 1e-2
        same(real.state_dict(), expected)
        real.load_state_dict(make(6).state_dict())
        model = make(rank_here())
        real.copy_to(model)
        same(model.state_dict(), make(6).state_dict())


def check_bytes(program: mw.Program) -> None:
    """What the program says that a step moves is what this rank sends, by axes, to the byte."""
    measured = sent_in_a_step(program, batch())
    assert measured == program.comm().bytes_by_axis(), (measured, program.comm().counts())
    assert measured


def check_not_finite(program: mw.Program) -> None:
    """A NaN that one rank has stops all of them, in the same words; then they go on."""
    with program.launch() as real:
        optimizer = real.optimizer(torch.optim.AdamW)
        good, bad = real.state_dict(), real.state_dict()
        bad["blocks.1.up.weight"][-1, -1] = torch.nan
        real.load_state_dict(bad)
        real.step(*batch())
        with pytest.raises(NonFiniteError, match=r"`blocks.1.up.weight` has a NaN on rank"):
            optimizer.step()
        assert not optimizer.state
        optimizer.zero_grad()
        real.load_state_dict(good)
        real.step(*batch())
        optimizer.step()
        real.check(optimizer)


def check_overflow(plan: str, folder: str) -> None:
    """What overflows on one rank alone is skipped by all, and a resumed run does the same."""
    program = scaled(plan)
    found = []
    for first in (0, 2):
        with program.launch() as real:
            optimizer = real.optimizer(torch.optim.AdamW, lr=1e-2)
            if first:
                real.load(folder, optimizer)
            for number in range(first, 4):
                if number == 2 and not first:
                    real.save(folder, optimizer)
                real.step(*batch(number))
                if number in (1, 3) and rank_here() == 1:
                    next(p for p in real.parameters() if p.grad is not None).grad.fill_(torch.inf)
                optimizer.step()
                optimizer.zero_grad()
                real.check(optimizer)
            assert (real.loss_scale, real.num_skipped) == (2.0**14, 2)
            found.append(real.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def check_descriptors(program: mw.Program) -> None:
    """A closed run leaves only the store's connections open."""
    numbers = []
    for _ in range(4):
        with program.launch() as real:
            real.step(*batch())
        numbers.append(len(os.listdir("/proc/self/fd")))
    assert numbers[-1] - numbers[0] <= 30, numbers


TOO_LARGE = "mesh tp=8\nallow replicate **"
ANOTHER = "\ncolumns blocks.0.up over tp"


def check_errors(num_ranks: int) -> None:
    """In words, and on every rank."""
    fitting = f"mesh tp={num_ranks}\nallow replicate **"
    for plan in (TOO_LARGE, fitting + ANOTHER * (rank_here() == 1)):
        try:
            compiled(plan).launch()
        except mw.RunError as error:
            print("\n".join(line for line in str(error).splitlines() if "digest" not in line))


def warm_up() -> None:
    """Compile what every rank trains; other shapes and modes, each compiles by itself."""
    for plan in PLANS.values():
        compiled(plan)
    scaled(PLANS["data"])


def main(folder: str, *plans: str) -> None:
    num_ranks = int(os.environ["WORLD_SIZE"])
    MODEL.load_state_dict(make(rank_here()).state_dict())
    for name in plans:
        program = compiled(PLANS[name])
        # Compiling again is what takes the time, most of all with more ranks than cores.
        more = num_ranks == 2 and name == plans[0]
        check_training(program, f"{folder}/{name}", more=more)
        check_bytes(program)
        check_not_finite(program)
        if more:
            check_descriptors(program)
            check_overflow(PLANS[name], f"{folder}/scaled")
    check_errors(num_ranks)
    print("done")

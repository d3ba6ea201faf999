"""Train a model whose layers share parameters, delink it, and train on; `main` is run by ranks.

Arguments: a plan, another to go on under or "-", and a folder for checkpoints.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import meshwright as mw
from tests.equivalence import Comparison
from tests.layers import SHARING, Deep, batch, tied

BEFORE, AFTER = 3, 10
KINDS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, float]]] = {
    "adam": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
}
BIASES = {"params": ["**.bias"], "weight_decay": 0.0}


@cache
def compiled(plan: str) -> mw.Program:
    return mw.compile(Deep(), mw.Plan.parse(SHARING.get(plan, plan)), batch())


def train(run: Any, optimizer: torch.optim.Optimizer, scheduler: StepLR, first: int, n: int) -> Any:
    """Steps of the run, or of a model in eager mode; the last loss."""
    loss = None
    for seed in range(first, first + n):
        if isinstance(run, nn.Module):
            loss = run(*batch(seed))
            loss.backward()
        else:
            loss = run.step(*batch(seed))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return loss


def scheduled(optimizer: torch.optim.Optimizer, before: StepLR | None = None) -> StepLR:
    found = StepLR(optimizer, 2, 0.7)
    if before is not None:
        found.load_state_dict(before.state_dict())
    return found


def expected(
    aliases: Mapping[str, str], kind: str, *, reset: bool = False
) -> dict[str, torch.Tensor]:
    """What eager mode trains to: layers that are tied, and then a model with copies of all."""
    make, options = KINDS[kind]

    def over(model: nn.Module) -> torch.optim.Optimizer:
        named = dict(model.named_parameters())
        biases = [value for name, value in named.items() if name.endswith("bias")]
        others = [value for name, value in named.items() if not name.endswith("bias")]
        return make([{**BIASES, "params": biases}, {"params": others}], **options)

    pseudo, real = tied(Deep(), aliases), Deep()
    first, second = over(pseudo), over(real)
    scheduler = scheduled(first)
    train(pseudo, first, scheduler, 0, BEFORE)
    real.load_state_dict(pseudo.state_dict())
    after = scheduled(second, scheduler)
    for group, own in zip(second.param_groups, first.param_groups, strict=True):
        group["lr"] = own["lr"]
    shared = dict(pseudo.named_parameters(remove_duplicate=False))
    for name, value in real.named_parameters() if not reset else ():
        second.state[value] = copy.deepcopy(first.state[shared[name]])
    train(real, second, after, BEFORE, AFTER)
    return real.state_dict()


def go_on(
    plan: str, other: str = "-", kind: str = "adam", state: str = "copy", folder: str = ""
) -> dict[str, torch.Tensor]:
    """Train, delink and train on; saves before and after go into the folder."""
    make, options = KINDS[kind]
    with compiled(plan).launch(seed=5) as run:
        optimizer = run.optimizer(make, groups=[BIASES], **options)
        scheduler = scheduled(optimizer)
        train(run, optimizer, scheduler, 0, BEFORE)
        if folder:
            run.save(Path(folder) / "pseudo", optimizer, extra=scheduler.state_dict())
        before, loss = run.state_dict(), run.evaluate(*batch())
        chosen = None if other == "-" else mw.Plan.parse(other)
        run, optimizer = run.delink(optimizer, plan=chosen, state=state)
        assert all(torch.equal(before[name], value) for name, value in run.state_dict().items())
        if chosen is None:
            assert torch.equal(run.evaluate(*batch()), loss)
        train(run, optimizer, scheduled(optimizer, scheduler), BEFORE, AFTER)
        run.check(optimizer)
        return run.state_dict()


def check(plan: str, found: dict[str, torch.Tensor], kind: str, *, reset: bool = False) -> None:
    """Assert that this is what the model trains to in eager mode."""
    compare = Comparison(1e-10)
    wanted = expected(compiled(plan).captured.aliases, kind, reset=reset)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        compare(name, found[name], value)
    compare.report()


def main(plan: str, other: str, folder: str) -> None:
    check(plan, go_on(plan, other, folder=folder), "adam")
    print("equal")

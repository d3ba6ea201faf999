"""A checkpoint of any plan loads into any other to the bit, and training goes on as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import meshwright as mw
from meshwright.runtime.checkpoint.folder import OpenSave
from meshwright.runtime.checkpoint.parts import read_whole
from tests.models import GPT_DATA, UNEVEN, Uneven, tokens
from tests.runtime.checkpoint.test_checkpoint import PATTERN, equal, launched, train
from tests.runtime.models import PLANS

PLAN_NAMES = [*PLANS, PATTERN, "mesh dp=1"]
GROUPS = [{"params": ["**.bias"], "weight_decay": 0.0}]
KINDS: list[tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.NAdam, {"lr": 1e-2, "weight_decay": 0.1}),
]
"""Tensors like the parameters only, with a count of steps, and with a product of numbers too."""


def contents(folder: Path) -> tuple[dict[str, Tensor], str]:
    """All that a checkpoint has, whatever plan wrote it: global tensors, and the rest as JSON."""
    with OpenSave.current(folder) as opened:
        manifest = opened.manifest
        tensors = {name: read_whole(name, manifest, opened.shards) for name in manifest.tensors}
        rest = (manifest.random, manifest.aliases, manifest.optimizer, manifest.extra)
        return tensors, json.dumps(rest, sort_keys=True)


def same(one: tuple[dict[str, Tensor], str], other: tuple[dict[str, Tensor], str]) -> bool:
    (ours, rest), (theirs, others_rest) = one, other
    return (
        rest == others_rest
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    )


def resume(target: str, kind: int, folder: Path) -> tuple[mw.Run, torch.optim.Optimizer]:
    """A run of another plan with other weights, made to go on from a checkpoint."""
    made, options = KINDS[kind]
    run = launched(target, seed=2)
    optimizer = run.optimizer(made, groups=GROUPS, **options)
    assert run.load(folder, optimizer) == {"epoch": 2}
    return run, optimizer


@pytest.mark.parametrize("number", range(len(PLAN_NAMES)), ids=[*PLANS, "pattern", "one rank"])
def test_a_checkpoint_of_any_plan_goes_on_under_any_other(tmp_path: Path, number: int) -> None:
    source = PLAN_NAMES[number]
    runs = {}
    for kind, (made, options) in enumerate(KINDS):
        run = launched(source, seed=1)
        optimizer = run.optimizer(made, groups=GROUPS, **options)
        train(run, optimizer, 0, 2)
        optimizer.param_groups[0]["lr"] = 3e-3
        run.save(tmp_path / str(kind), optimizer, extra={"epoch": 2})
        saved = contents(tmp_path / str(kind))
        train(run, optimizer, 2, 2)
        runs[kind] = run, saved
    for place, target in enumerate(PLAN_NAMES):
        kind = (number + place) % len(KINDS)
        run, saved = runs[kind]
        other, theirs = resume(target, kind, tmp_path / str(kind))
        other.save(tmp_path / "again", theirs, extra={"epoch": 2})
        assert same(contents(tmp_path / "again"), saved), target
        train(other, theirs, 2, 2)
        other.check(theirs)
        assert equal(other, run, 0.0 if target == source else 1e-11), target


UNEVEN_PLANS = {
    "block": f"mesh dp=4, tp=2\n{GPT_DATA}{UNEVEN}zero 3 over dp\n",
    "accumulated": f"mesh dp=3, tp=2\naccumulate 2\n{GPT_DATA}{UNEVEN}zero 1 over dp\n",
    "whole": f"mesh dp=4\n{GPT_DATA}zero 2 over dp\n",
    "tensor": f"mesh tp=2\n{UNEVEN}",
    "one": "mesh dp=1\n",
}


def test_what_storage_adds_is_in_no_checkpoint_norm_or_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = Uneven().double(), [tokens(11, 12, 4) for _ in range(4)]
    programs = {
        name: mw.compile(model, mw.Plan.parse(plan), example=batches[0])
        for name, plan in UNEVEN_PLANS.items()
    }
    trained: dict[str, tuple[mw.Run, float]] = {}
    for source, program in programs.items():
        run = program.launch()
        optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
        advance(run, optimizer, batches[:2])
        run.save(tmp_path / source, optimizer)
        trained[source] = run, advance(run, optimizer, batches[2:])
        assert trained[source][1] == pytest.approx(trained["block"][1], abs=1e-12)
    for source, (run, norm) in trained.items():
        for target, program in programs.items():
            other = program.launch(seed=1)
            theirs = other.optimizer(torch.optim.AdamW, lr=1e-2)
            other.load(tmp_path / source, theirs)
            other.save(tmp_path / "again", theirs)
            assert same(contents(tmp_path / "again"), contents(tmp_path / source)), target
            assert advance(other, theirs, batches[2:]) == pytest.approx(norm, abs=1e-12)
            other.check(theirs)
            assert equal(other, run, 0.0 if target == source else 1e-11), (source, target)


def advance(
    run: mw.Run, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
) -> float:
    """Train with clipped gradients; returns the last norm."""
    for batch in batches:
        run.step(*batch)
        norm = run.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    return float(norm)

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

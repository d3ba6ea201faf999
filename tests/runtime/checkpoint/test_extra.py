"""Values of the caller's own come back equal, and only plain ones are taken."""

from __future__ import annotations

import enum
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import meshwright as mw
from meshwright.runtime.checkpoint.extra import read_extra, written_extra
from tests.runtime.checkpoint.test_checkpoint import launched
from tests.runtime.checkpoint.test_loading import adamw


class Phase(enum.IntEnum):
    WARM_UP = 1


ITSELF: dict[str, Any] = {}
ITSELF["itself"] = ITSELF


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"epoch": 3, "best": math.inf, "name": "ü\ud800", "done": False, "nothing": None},
        {"tuple": (1, (2.5, [])), "whole keys": {1: "a", False: "b"}, "mixed": {None: 1, "x": 2}},
        {"()": [1]},
        {"{}": {"()": ()}},
        {"python": random.getstate(), "large": 2**128},
    ],
)
def test_plain_values_come_back_equal(extra: dict[str, Any]) -> None:
    found = read_extra(json.loads(json.dumps(written_extra(extra))))
    assert found == extra
    assert repr(found) == repr(extra)


def test_values_of_subclasses_come_back_plain() -> None:
    found = read_extra(written_extra({"phase": Phase.WARM_UP, "counts": Counter({3: 2})}))
    assert found == {"phase": 1, "counts": {3: 2}}
    assert (type(found["phase"]), type(found["counts"])) == (int, dict)


@pytest.mark.parametrize(
    ("case", "extra"),
    {
        "a list": [1],
        "a tensor": {"sampler": {"order": torch.ones(2)}},
        "a module": {"all": [0, (torch.nn.ReLU(),)]},
        "bytes": {"state": b"abc"},
        "a key": {"by place": {(0, 1): 2}},
        "itself": ITSELF,
        "a long number": {"n": 1 << 20_000},
        "large": {"text": "x" * (17 << 20)},
    }.items(),
)
def test_other_values_are_refused(
    tmp_path: Path, golden: Callable[[str, str], None], case: str, extra: Any
) -> None:
    with pytest.raises(mw.RunError) as caught:
        launched("tensor").save(tmp_path / "folder", extra=extra)
    golden(f"extra_{case.replace(' ', '_')}", str(caught.value))
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("found", [[1], 3, {"()": 3}, {"{}": [[1]]}, {"{}": [[[], 1]]}])
def test_what_no_save_wrote_is_refused(found: Any) -> None:
    with pytest.raises(mw.RunError, match="`extra` cannot be read"):
        read_extra(found)


SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
    lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.5),
    lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9),
    lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [3],
    ),
]


def test_schedulers_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    run = launched("tensor")
    for number, make in enumerate(SCHEDULERS):
        optimizer = adamw(run)
        scheduler = make(optimizer)
        for _ in range(2):
            optimizer.step()
            scheduler.step()
        folder = tmp_path / str(number)
        run.save(folder, optimizer, extra={"scheduler": scheduler.state_dict(), "epoch": 2})
        fresh = adamw(run)
        theirs = make(fresh)
        extra = run.load(folder, fresh)
        theirs.load_state_dict(extra["scheduler"])
        assert extra["epoch"] == 2
        for _ in range(4):
            rates = [[group["lr"] for group in each.param_groups] for each in (optimizer, fresh)]
            assert rates[0] == rates[1], type(scheduler)
            for each in (optimizer, scheduler, fresh, theirs):
                each.step()

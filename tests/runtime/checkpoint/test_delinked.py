"""Checkpoints of layers that share parameters: loaded as they are, and with copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import meshwright as mw
from meshwright.cli import main
from tests.layers import TENSOR, Deep, batch
from tests.runtime.delinked import AFTER, BEFORE, BIASES, check, compiled, scheduled, train

PSEUDO = "mesh dp=2\ndata x over dp\nzero 2 over dp\nshare blocks.*\n"
OTHER_PSEUDO = f"mesh tp=2\n{TENSOR}share blocks.*\n"
REAL = f"mesh dp=2, tp=2\ndata x over dp\n{TENSOR}zero 3 over dp\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three steps under `PSEUDO`."""
    folder = tmp_path_factory.mktemp("pseudo")
    with compiled(PSEUDO).launch(seed=5) as run:
        optimizer = run.optimizer(torch.optim.AdamW, groups=[BIASES], lr=1e-2, weight_decay=0.1)
        scheduler = scheduled(optimizer)
        train(run, optimizer, scheduler, 0, BEFORE)
        run.save(folder, optimizer, extra=scheduler.state_dict())
    return folder


def delinked(*words: object) -> None:
    assert main(["ckpt", "delink", *map(str, words)]) == 0


def go_on(plan: str, folder: Path, *, with_optimizer: bool = True) -> dict[str, torch.Tensor]:
    """Load under another plan, train on, and say what that gives."""
    with compiled(plan).launch() as run:
        optimizer = run.optimizer(torch.optim.AdamW, groups=[BIASES], lr=1e-2, weight_decay=0.1)
        scheduler = scheduled(optimizer)
        extra = run.load(folder, optimizer if with_optimizer else None)
        scheduler.load_state_dict(extra)
        for group in optimizer.param_groups:
            (group["lr"],) = set(extra["_last_lr"])
        train(run, optimizer, scheduler, BEFORE, AFTER)
        run.check(optimizer)
        return run.state_dict()


def test_the_program_with_copies_loads_what_was_shared(saved: Path) -> None:
    check(PSEUDO, go_on(REAL, saved), "adam")


@pytest.mark.parametrize("reset", [False, True])
def test_a_checkpoint_that_was_delinked_on_disk_goes_on_alike(
    reset: bool, saved: Path, tmp_path: Path
) -> None:
    delinked(saved, tmp_path, *["--reset"] * reset)
    assert main(["ckpt", "verify", str(tmp_path)]) == 0
    check(PSEUDO, go_on(REAL, tmp_path), "adam", reset=reset)


def test_what_is_shared_is_saved_once_and_loads_under_any_plan_that_shares_it(
    saved: Path, tmp_path: Path
) -> None:
    delinked(saved, tmp_path)
    sizes = [
        sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        for folder in (saved, tmp_path)
    ]
    assert 2.5 * sizes[0] < sizes[1] < 4 * sizes[0]
    with compiled(OTHER_PSEUDO).launch() as run:
        run.load(saved, run.optimizer(torch.optim.AdamW, groups=[BIASES]))
        found = run.state_dict()
    wanted = mw.read_state_dict(saved)
    assert wanted.keys() == found.keys() == Deep().state_dict().keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    manifest = json.loads(next(tmp_path.rglob("manifest.json")).read_text())
    assert "share" not in manifest["plan"] and "apart" not in manifest


def test_layers_that_differ_do_not_load_where_they_are_shared(
    saved: Path, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    delinked(saved, tmp_path)
    with compiled(PSEUDO).launch() as run, pytest.raises(mw.RunError) as caught:
        run.load(tmp_path)
    golden("load-under-share", str(caught.value).replace(str(tmp_path), "folder"))


def test_nothing_shared_is_an_error_and_nothing_is_written(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], golden: Callable[..., None]
) -> None:
    delinked(saved, tmp_path / "real")
    assert main(["ckpt", "delink", str(tmp_path / "real"), str(tmp_path / "again")]) == 1
    golden("delink-nothing", capfd.readouterr().err.replace(str(tmp_path), "folder"))
    assert not (tmp_path / "again").exists()


def test_momentum_buffers_of_none_and_steps_of_numbers_are_copied(tmp_path: Path) -> None:
    with compiled("mesh one=1\nshare blocks.* every=2\n").launch() as run:
        optimizer = run.optimizer(torch.optim.NAdam, lr=1e-2)
        run.step(*batch())
        optimizer.step()
        run.save(tmp_path / "pseudo", optimizer)
        run, optimizer = run.delink(optimizer)
        run.save(tmp_path / "here", optimizer)
    delinked(tmp_path / "pseudo", tmp_path / "disk")
    found = [
        json.loads(next((tmp_path / name).rglob("manifest.json")).read_text())
        for name in ("here", "disk")
    ]
    for key in ("aliases", "optimizer", "random", "tensors"):
        assert found[0][key] == found[1][key], key

"""Saves that fail: every rank says so in words, the save before stays, and the run goes on."""

from __future__ import annotations

import errno
import functools
import random
import re
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

import meshwright as mw
from meshwright.runtime.checkpoint import saving
from meshwright.runtime.checkpoint.header import Header
from tests.runtime.forked import Forked
from tests.runtime.models import PLANS, batch, make


@functools.cache
def compiled() -> mw.Program:
    return mw.compile(make(), mw.Plan.parse(PLANS["tensor"]), batch())


def everything(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[mw.Run]:
    """A run that has saved, and trained on; afterwards that save is still there, and it trains."""
    run = compiled().launch()
    run.save(tmp_path)
    before, saved = everything(tmp_path), run.state_dict()
    run.step(*batch())
    yield run
    assert everything(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-0"]
    run.load(tmp_path)
    assert all(torch.equal(run.state_dict()[name], value) for name, value in saved.items())
    run.step(*batch())
    run.save(tmp_path, keep=1)
    assert everything(tmp_path).keys().isdisjoint(before.keys())


def test_a_full_disk_is_told_by_file_and_reason(run: mw.Run, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            mw.RunError, match=r"on rank 0: cannot write `.*00000\.safetensors`: File"
        ) as caught:
            run.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "on rank 1: cannot write" in str(caught.value)
    assert "make room there" in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_names_it(
    run: mw.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, number: int
) -> None:
    write = saving.write_shard

    def fails(file: BinaryIO, path: Path, *rest: object) -> str:
        if path.name == f"{rank:05}.safetensors":
            raise saving.cannot("write", path, OSError(number, "the reason"), "make room there")
        return write(file, path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_shard", fails)
    with pytest.raises(
        mw.RunError, match=rf"on rank {rank}: cannot write `.*0000{rank}.*: the reason"
    ):
        run.save(tmp_path)
    monkeypatch.undo()


def test_a_tensor_that_cannot_be_held_is_refused_before_anything_is_written(
    run: mw.Run, tmp_path: Path
) -> None:
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    for name, parameter in run.named_parameters():
        if name == "spare":
            odd = torch.zeros_like(parameter, dtype=torch.complex128)
            optimizer.state[parameter]["odd"] = odd
    with pytest.raises(mw.RunError, match=r"`optimizer/odd/spare` has type `torch\.complex128`"):
        run.save(tmp_path, optimizer)


def test_ranks_that_hold_other_tensors_are_told(run: mw.Run, tmp_path: Path) -> None:
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.step()
    del optimizer.state[run.states[1].parameters["blocks.0.up.weight"]]
    with pytest.raises(
        mw.RunError, match=r"rank 1 wrote no `optimizer/momentum_buffer/.*`, which rank 0 has as"
    ):
        run.save(tmp_path, optimizer)


def test_a_file_that_is_gone_before_the_manifest_is_written_is_told(
    run: mw.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_shard

    def lost(file: BinaryIO, path: Path, *rest: object) -> str:
        digest = write(file, path, *rest)  # type: ignore[arg-type]
        if path.name.startswith("00001"):
            path.unlink()
        return digest

    monkeypatch.setattr(saving, "write_shard", lost)
    with pytest.raises(
        mw.RunError, match=r"`.*00001\.safetensors`, which rank 1 wrote, is not there"
    ):
        run.save(tmp_path)
    monkeypatch.undo()


def test_a_file_of_another_save_under_a_ranks_name_is_told(
    run: mw.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = saving.write_shard

    def stale(file: BinaryIO, path: Path, header: Header, *rest: object) -> str:
        if path.name.startswith("00001"):
            header = replace(header, save="f" * 32)
        return write(file, path, header, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(saving, "write_shard", stale)
    with pytest.raises(mw.RunError, match=r"00001\.safetensors` was written by rank 1 in save `ff"):
        run.save(tmp_path)
    monkeypatch.undo()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_save_leaves_the_one_before(
    run: mw.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    write = saving.write_shard

    def interrupted(file: BinaryIO, path: Path, *rest: object) -> None:
        write(file, path, *rest)  # type: ignore[arg-type]
        if path.name.startswith("00001"):
            raise kind

    monkeypatch.setattr(saving, "write_shard", interrupted)
    with pytest.raises(kind):
        run.save(tmp_path)
    monkeypatch.undo()


def test_a_manifest_that_no_save_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "an extension"}')
    with pytest.raises(mw.RunError, match=r"is a checkpoint itself: it has a `manifest\.json`"):
        compiled().launch().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_save_draws_no_random_numbers_of_the_script(tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    run = compiled().launch(seed=-5)
    run.save(tmp_path)
    run.load(tmp_path)
    assert run.states[1].random.seed == -5
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_save_that_fails_on_one_process_is_told_by_all_and_training_goes_on(
    tmp_path: Path, forked: Forked
) -> None:
    outputs = forked.outputs("tests.runtime.checkpoint.failing_saves", 2, tmp_path)
    assert outputs[0] == outputs[1]
    text = re.sub(r"[0-9a-f]{32}", "SAVE", outputs[0].replace(str(tmp_path), ""))
    assert text == EXPECTED
    assert not (tmp_path / "other").exists()
    assert len(list((tmp_path / "common").iterdir())) == 2


FOLDER_GONE = "the folder that rank 0 made is not there"
EXPECTED = f"""\
saved
on rank 1: cannot write `/other/saving-SAVE/00001.safetensors`: {FOLDER_GONE}
  help: give every rank one folder, on a filesystem that all of them share
on rank 1: cannot write `/common/saving-SAVE/00001.safetensors`: File too large
  help: make room there, or name another folder
on rank 1: the optimizer has a parameter that this run does not hold
  help: make the optimizer with `run.optimizer(...)` of the same run
on rank 1: the path is a `NoneType`
  help: pass the name of a folder
rank 1 wrote no `optimizer/exp_avg/blocks.0.down.weight`, which rank 0 has as float64
  help: give every rank the same optimizer, in the same state
steps 0
saved
"""

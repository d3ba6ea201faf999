"""Saves in the background: they hold what was there, and a later call tells what went wrong."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import meshwright as mw
from meshwright.runtime.checkpoint import saving
from tests.runtime.checkpoint import forks
from tests.runtime.checkpoint.states import differing, snapshot
from tests.runtime.checkpoint.test_checkpoint import compiled, launched, train
from tests.runtime.checkpoint.test_loading import adamw
from tests.runtime.forked import Forked

write_shard = saving.write_shard


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that writes nothing until it is set."""
    free = threading.Event()

    def waits(*given: Any) -> str:
        assert free.wait(60)
        return write_shard(*given)

    monkeypatch.setattr(saving, "write_shard", waits)
    return free


def fills_up(monkeypatch: pytest.MonkeyPatch, rank: int = 1) -> None:
    """Let the disk of a rank be full."""

    def full(file: Any, path: Path, *rest: Any) -> str:
        if path.name.startswith(f"{rank:05}"):
            raise mw.RunError("the disk is full", help="make room there")
        return write_shard(file, path, *rest)

    monkeypatch.setattr(saving, "write_shard", full)


def test_what_is_trained_meanwhile_is_not_saved(tmp_path: Path, disk: threading.Event) -> None:
    run = launched("both", seed=1)
    optimizer = adamw(run)
    train(run, optimizer, 0, 2)
    before, extra = snapshot(run, optimizer), {"place": [1, 2]}
    run.save(tmp_path, optimizer, extra=extra, wait=False)
    extra["place"].append(3)
    optimizer.param_groups[0]["lr"] = 0.5
    train(run, optimizer, 2, 2)
    (unfinished,) = names(tmp_path)
    assert unfinished.startswith("saving-")
    disk.set()
    run.wait_saved()
    assert names(tmp_path) == ["step-2"]
    assert run.load(tmp_path, optimizer) == {"place": [1, 2]}
    assert not differing(before, snapshot(run, optimizer))
    run.wait_saved()


def test_a_save_becomes_a_checkpoint_while_nobody_waits(tmp_path: Path) -> None:
    run = launched("tensor")
    run.save(tmp_path, wait=False)
    for thread in threading.enumerate():
        if thread.name == "meshwright save":
            thread.join(60)
    assert names(tmp_path) == ["step-0"]
    run.close()


ENDS: dict[str, Callable[[mw.Run, Path], Any]] = {
    "save": lambda run, folder: run.save(folder),
    "another in the background": lambda run, folder: run.save(folder, wait=False),
    "load": lambda run, folder: run.load(folder),
    "wait_saved": lambda run, folder: run.wait_saved(),
    "close": lambda run, folder: run.close(),
    "with": lambda run, folder: run.__exit__(None, None, None),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_next_call_waits_and_tells_once_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    run = launched("tensor")
    run.save(tmp_path)
    with monkeypatch.context() as patched:
        fills_up(patched)
        run.save(tmp_path, wait=False)
        with pytest.raises(mw.RunError, match="on rank 1: the disk is full"):
            ENDS[end](run, tmp_path)
    assert names(tmp_path) == ["step-0"]
    if end not in ("close", "with"):
        run.save(tmp_path, wait=False)
        ENDS[end](run, tmp_path)
        run.close()
        assert names(tmp_path)[:2] == ["step-0", "step-0-2"]


def test_an_interrupted_wait_is_gone_on_with(
    tmp_path: Path, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launched("tensor")
    run.save(tmp_path, wait=False)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saving._Saving, "_written", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.wait_saved()
    disk.set()
    run.wait_saved()
    assert names(tmp_path) == ["step-0"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_run_that_ends_by_an_exception_ends_its_save_first(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    def interrupted() -> None:
        with compiled("both").launch() as run:
            run.save(tmp_path, wait=False)
            raise kind

    with pytest.raises(kind):
        interrupted()
    assert names(tmp_path) == ["step-0"]


def test_what_such_a_run_could_not_save_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def mistaken() -> None:
        with compiled("both").launch() as run:
            run.save(tmp_path, wait=False)
            raise ValueError("a mistake")

    fills_up(monkeypatch)
    with pytest.raises(ValueError, match="a mistake"):
        mistaken()
    assert not names(tmp_path)
    assert f"the last save into `{tmp_path}` failed: the disk is full" in capfd.readouterr().err


def test_a_forked_process_neither_waits_nor_keeps_the_save(
    tmp_path: Path, disk: threading.Event
) -> None:
    run = launched("tensor")
    run.save(tmp_path, wait=False, keep=1)
    assert forks.ended([forks.forked(run.close)], 60) == [0]
    lives = forks.forked(functools.partial(os.read, os.pipe()[0], 1))
    disk.set()
    run.wait_saved()
    run.save(tmp_path, keep=1)
    assert names(tmp_path) == ["step-0-2"]
    os.kill(lives, 9)
    os.waitpid(lives, 0)


def test_a_folder_that_is_removed_meanwhile_is_told(tmp_path: Path, disk: threading.Event) -> None:
    run, folder = launched("tensor"), tmp_path / "folder"
    run.save(folder, wait=False)
    folder.rename(tmp_path / "moved")
    disk.set()
    with pytest.raises(mw.RunError, match=r"cannot write `.*saving-"):
        run.wait_saved()
    run.save(folder)
    assert names(folder) == ["step-0"]


def test_the_working_directory_may_change_meanwhile(
    tmp_path: Path, disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = launched("tensor"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    run.save("folder", wait=False)
    monkeypatch.chdir(elsewhere)
    disk.set()
    run.wait_saved()
    assert names(tmp_path / "folder") == ["step-0"]
    elsewhere.rmdir()
    with pytest.raises(mw.RunError, match="cannot write into `folder`: No such file or directory"):
        run.save("folder")


@pytest.mark.parametrize("keep", [0, -1, True, "3", 1.0])
def test_a_number_to_keep_that_cannot_be_is_refused(tmp_path: Path, keep: Any) -> None:
    with pytest.raises(mw.RunError, match="`keep` is"):
        launched("tensor").save(tmp_path / "new", keep=keep)
    assert not (tmp_path / "new").exists()


def test_no_checkpoint_is_accepted_where_that_is_asked_for(tmp_path: Path) -> None:
    run = launched("tensor")
    assert run.load(tmp_path / "nowhere", missing_ok=True) == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(mw.RunError, match=r"cannot read `.*file`: Not a directory"):
        run.load(tmp_path / "file", missing_ok=True)
    run.save(tmp_path, extra={"number": 1})
    assert run.load(tmp_path, missing_ok=True) == {"number": 1}
    (tmp_path / "step-0" / "manifest.json").unlink()
    with pytest.raises(mw.RunError, match=r"cannot read `.*step-0/manifest\.json`"):
        run.load(tmp_path, missing_ok=True)
    with pytest.raises(mw.RunError, match=r"there is no checkpoint in `.*step-0`"):
        run.load(tmp_path / "step-0", missing_ok=True)


def test_a_run_does_not_begin_anew_beside_a_checkpoint_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    run = launched("tensor")
    monkeypatch.chdir(tmp_path)
    run.save("saves", extra={"number": 1})
    Path("saves/step-0").rename("saves/best")
    for name in ("images", "jobs/one/step-3", f"saving-{'0' * 32}"):
        (Path("saves") / name).mkdir(parents=True)
    for missing_ok in (False, True):
        with pytest.raises(mw.RunError) as caught:
            run.load("saves", missing_ok=missing_ok)
        golden("renamed", str(caught.value))
    assert run.load("saves/best") == {"number": 1}
    Path("saves/best/manifest.json").unlink()
    with pytest.raises(mw.RunError, match="`saves/best` has files of one, under another name"):
        run.load("saves", missing_ok=True)
    Path("saves/best").rename("elsewhere")
    assert run.load("saves", missing_ok=True) == {}
    Path("link").symlink_to("not mounted")
    with pytest.raises(mw.RunError, match="cannot read `link`: No such file"):
        run.load("link", missing_ok=True)


def test_processes_save_in_the_background_while_they_train(tmp_path: Path, forked: Forked) -> None:
    outputs = forked.outputs("tests.runtime.checkpoint.background", 2, tmp_path)
    assert outputs == ["right\non rank 1: the disk is full\n  help: make room there\n"] * 2
    # What was under way when the scripts ended is whole.
    assert names(tmp_path) == ["step-3", "step-5", "step-6"]

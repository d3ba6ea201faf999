"""The folder: the save before stays until the next is whole, and only what is of no use goes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

import meshwright as mw
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.checkpoint import folder as folder_module
from meshwright.runtime.checkpoint.folder import NewSave, OpenSave, checkpoints, remove_unused
from meshwright.runtime.checkpoint.header import Header
from meshwright.runtime.checkpoint.locks import try_lock
from meshwright.runtime.checkpoint.manifest import Manifest, SavedTensor
from meshwright.runtime.checkpoint.shards import Shard, read_header, shard_path, write_shard
from tests.runtime.checkpoint.forks import ended, forked
from tests.runtime.checkpoint.kills import killer
from tests.runtime.processes import environment


def begun(folder: Path) -> NewSave:
    new = NewSave(folder)
    new.begin()
    return new


def commit(new: NewSave, value: float, keep: int | None = 1) -> str:
    """Write a tensor and make a checkpoint of it, of the step `value`; the name of its folder."""
    path = shard_path(new.path, 0)
    tensors = {"w": torch.tensor([float(value)])}
    assert new.file is not None
    digest = write_shard(new.file, path, Header.of(new.name, 0, tensors), tensors)
    saved = SavedTensor((1,), "float32", replicated((1,)), (0,), ())
    random = {"seed": 0, "step": int(value), "num_updates": 0}
    mesh, (_, size, header) = Mesh((("dp", 1),)), read_header(path)
    shards = (Shard(size, header, digest),)
    manifest = Manifest(new.name, mesh, "", random, {"w": "w"}, {"w": saved}, None, shards)
    return new.commit(manifest, keep).name


def save(folder: Path, value: float, keep: int | None = 1) -> str:
    return commit(begun(folder), value, keep)


def value_of(opened: OpenSave) -> float:
    return float(opened.shards.part(0, "w", (1,), torch.float32))


def value(folder: Path) -> float:
    with OpenSave.current(folder) as opened:
        return value_of(opened)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "try_lock", lambda *_, **__: None)


def test_a_save_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    assert save(tmp_path, 1) == "step-1"
    save(tmp_path, 2)
    assert names(tmp_path) == {"step-2"}
    assert value(tmp_path) == value(tmp_path / "step-2") == 2


def test_the_newest_are_kept_in_the_order_in_which_they_were_saved(tmp_path: Path) -> None:
    for step in (100, 110, 120):
        save(tmp_path, step, keep=3)
    # A run that went back to step 100 goes another way from there.
    assert save(tmp_path, 110, keep=3) == "step-110-2"
    assert value(tmp_path) == 110
    assert names(tmp_path) == {"step-110", "step-120", "step-110-2"}
    assert save(tmp_path, 110, keep=2) == "step-110-3"
    assert names(tmp_path) == {"step-110-2", "step-110-3"}
    save(tmp_path, 5, keep=None)
    assert [path.name for _, path in checkpoints(tmp_path)] == [
        "step-110-2",
        "step-110-3",
        "step-5",
    ]


def test_what_is_damaged_does_not_count_among_what_is_kept(tmp_path: Path) -> None:
    for step in range(4):
        save(tmp_path, step, keep=None)
    os.truncate(tmp_path / "step-3" / "00000.safetensors", 10)
    (tmp_path / "step-2" / "manifest.json").unlink()
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == {"step-1", "step-2", "step-3", "step-4"}
    with pytest.raises(mw.RunError, match=r"step-2/manifest\.json.*\n.*such as `.*step-4`"):
        value(tmp_path)
    assert value(tmp_path / "step-4") == 4


def test_the_save_before_stays_until_the_next_is_whole(tmp_path: Path) -> None:
    save(tmp_path, 1)
    new = begun(tmp_path)
    assert value(tmp_path) == 1
    new.close()
    assert names(tmp_path) == {"step-1"}
    assert value(tmp_path) == 1


def test_a_save_that_is_read_stays_until_nobody_reads_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with OpenSave.current(tmp_path) as opened:
        save(tmp_path, 2)
        assert not opened.gone(tmp_path)
        assert value_of(opened) == 1
        assert names(tmp_path) == {"step-1", "step-2"}
    save(tmp_path, 3)
    assert names(tmp_path) == {"step-3"}


def test_saves_side_by_side_leave_the_last_and_do_not_touch_each_other(tmp_path: Path) -> None:
    one, other = begun(tmp_path), begun(tmp_path)
    commit(one, 1)
    assert value(tmp_path) == 1
    assert other.path.is_dir()
    commit(other, 2)
    assert value(tmp_path) == 2
    assert names(tmp_path) == {"step-2"}
    one.close()
    other.close()
    assert value(tmp_path) == 2


def test_leavings_of_a_process_that_was_killed_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    script = (
        "import os, sys, pathlib\n"
        "from meshwright.runtime.checkpoint.folder import NewSave\n"
        f"new = NewSave(pathlib.Path({str(tmp_path)!r}))\n"
        "new.begin()\n"
        "(new.path / '00001.safetensors').write_text('half a file')\n"
        "print(new.path.name, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    dead = process.stdout.readline().strip()
    # While it lives, nobody takes it away.
    save(tmp_path, 2)
    assert names(tmp_path) == {"step-2", dead}
    process.kill()
    process.communicate()
    save(tmp_path, 3)
    assert names(tmp_path) == {"step-3"}


def test_a_save_that_is_killed_after_any_call_leaves_one_whole_save(tmp_path: Path) -> None:
    before = 0.0
    save(tmp_path, before)

    def dies(number: int) -> None:
        sys.setprofile(killer(number))
        save(tmp_path, number)
        sys.setprofile(None)

    for number in range(1, 200):
        status = ended([forked(lambda number=number: dies(number))], 60)  # type: ignore[misc]
        found = value(tmp_path)
        assert found in (before, number)
        if status == [0]:
            break
        assert status == [-9]
        before = number + 0.5
        save(tmp_path, before)
        assert names(tmp_path) == {f"step-{number}" + "-2" * (found == number)}
    assert found == number > 15
    assert names(tmp_path) == {f"step-{number}"}


@pytest.fixture
def strangers(tmp_path: Path) -> Iterator[None]:
    """What somebody else put into the folder, and which must stay."""
    hexadecimal = "saving-" + "ab" * 16
    (tmp_path / "notes").mkdir()
    (tmp_path / "000001-00000.safetensors").write_text("a shard of another format")
    (tmp_path / "0123.safetensors").write_text("a model")
    (tmp_path / hexadecimal).mkdir()
    (tmp_path / hexadecimal / "00000.safetensors").write_text("")
    (tmp_path / hexadecimal / "diary.txt").write_text("dear diary")
    (tmp_path / ("saving-" + "cd" * 16)).write_text("a file of our folders' form")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "00000.safetensors").write_text("")
    (tmp_path / ("saving-" + "ef" * 16)).symlink_to(tmp_path / "elsewhere")
    linked = tmp_path / ("saving-" + "01" * 16)
    linked.mkdir()
    (linked / "00000.safetensors").symlink_to(tmp_path / "0123.safetensors")
    (tmp_path / ("saving-" + "23" * 16) / "00000.safetensors").mkdir(parents=True)
    (tmp_path / ("saving-" + "AB" * 16)).mkdir()
    (tmp_path / ("ab" * 16)).mkdir()
    (tmp_path / "step-x").mkdir()
    save(tmp_path / "archive", 0)
    (tmp_path / "step-0").symlink_to(tmp_path / "archive" / "step-0")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    yield
    assert {path: path.read_bytes() for path in before} == before
    assert all(path.is_dir() for path in folders)


@pytest.mark.usefixtures("strangers")
def test_what_is_not_a_save_is_never_touched(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path, number)
    assert value(tmp_path) == 2


def test_an_empty_folder_of_a_save_that_never_began_is_removed(tmp_path: Path) -> None:
    (tmp_path / ("saving-" + "ab" * 16)).mkdir()
    other = tmp_path / ("saving-" + "cd" * 16)
    other.mkdir()
    (other / "00001.safetensors").write_text("of a rank that outlived rank 0")
    (other / "00001.sha256").write_text("")
    save(tmp_path, 1)
    assert names(tmp_path) == {"step-1"}


def test_what_a_network_filesystem_keeps_of_an_open_file_does_not_keep_the_others(
    tmp_path: Path,
) -> None:
    name = ".nfs000000000000002a00000001"
    (tmp_path / save(tmp_path, 1) / name).write_text("")
    save(tmp_path, 2)
    (left,) = tmp_path.glob("saving-*")
    assert [path.name for path in left.iterdir()] == [name]
    (left / name).unlink()
    save(tmp_path, 3)
    assert names(tmp_path) == {"step-3"}


def test_a_save_whose_folder_is_removed_before_its_lock_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    made: list[Path] = []
    create = folder_module.create_file

    def slow(path: Path) -> object:
        made.append(path)
        if len(made) == 1:
            remove_unused(tmp_path, None)
        file = create(path)
        if len(made) == 2:
            remove_unused(tmp_path, None)
        return file

    monkeypatch.setattr(folder_module, "create_file", slow)
    new = begun(tmp_path)
    assert len(made) == 3
    assert new.path.is_dir()
    commit(new, 2)
    assert names(tmp_path) == {"step-2"}


def test_a_save_that_begins_while_its_folder_is_looked_at_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    begins, list_files = tmp_path / ("saving-" + "ab" * 16), os.scandir
    begins.mkdir()

    def late(path: Path) -> object:
        if path == begins:
            (begins / "00000.safetensors").touch()
        return list_files(path)

    monkeypatch.setattr(os, "scandir", late)
    remove_unused(tmp_path, None)
    assert (begins / "00000.safetensors").exists()


def test_a_folder_whose_saves_vanish_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "try_lock", lambda *_, **__: False)
    with pytest.raises(mw.RunError, match="removed at once"):
        begun(tmp_path)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_only_whole_checkpoints_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = begun(tmp_path)
    save(tmp_path, 2)
    assert names(tmp_path) == {"step-2", other.path.name}
    with OpenSave.current(tmp_path) as opened:
        commit(other, 3)
        assert names(tmp_path) == {"step-3"}
        with pytest.raises(mw.RunError, match="cannot read `w`"):
            value_of(opened)
        assert opened.gone(tmp_path)
    assert value(tmp_path) == 3


@pytest.mark.usefixtures("no_locks")
def test_a_reader_whose_save_vanishes_starts_again_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    find, found = folder_module.current_path, []

    def overtaken(folder: Path) -> Path:
        found.append(find(folder))
        if len(found) < 4:
            save(tmp_path, len(found) + 1)
        return found[-1]

    monkeypatch.setattr(folder_module, "current_path", overtaken)
    assert value(tmp_path) == 4
    assert len(found) == 4


def test_a_checkpoint_saved_anew_under_a_name_is_not_removed_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removed the old one, and a third saved, since this one listed them."""
    save(tmp_path, 1)
    before = checkpoints(tmp_path)
    save(tmp_path, 2)
    save(tmp_path, 1)
    monkeypatch.setattr(folder_module, "_heads", lambda _: (before, None))
    remove_unused(tmp_path, 0)
    assert names(tmp_path) == {"step-1"}
    assert value(tmp_path) == 1


def test_an_error_while_the_save_gets_its_name_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    new = begun(tmp_path)

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(mw.RunError, match=r"cannot write `.*manifest\.json`: Input/output"):
            commit(new, 2)
    new.close()
    assert names(tmp_path) == {"step-1"}
    assert value(tmp_path) == 1


def test_an_interruption_after_the_save_has_its_name_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    new, rename = begun(tmp_path), os.rename

    def interrupted(*paths: Path) -> None:
        rename(*paths)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            commit(new, 2)
    new.close()
    assert value(tmp_path) == 2
    save(tmp_path, 3)
    assert names(tmp_path) == {"step-3"}


@pytest.mark.parametrize("kind", ["a file", "a link", "a folder with files"])
def test_a_name_that_somebody_else_has_taken_is_left_to_them(tmp_path: Path, kind: str) -> None:
    taken = tmp_path / "step-7"
    if kind == "a file":
        taken.write_text("")
    elif kind == "a link":
        taken.symlink_to("nowhere")
    else:
        taken.mkdir()
        (taken / "diary.txt").write_text("dear diary")
    assert save(tmp_path, 7) == "step-7-2"
    assert os.path.lexists(taken)
    assert value(tmp_path / "step-7-2") == 7


def test_a_folder_that_can_only_be_read_is_read(tmp_path: Path) -> None:
    name = save(tmp_path, 1)
    os.chmod(tmp_path / name / "00000.safetensors", 0o444)
    for folder in (tmp_path / name, tmp_path):
        os.chmod(folder, 0o555)
    try:
        assert value(tmp_path) == 1
    finally:
        for folder in (tmp_path, tmp_path / name):
            os.chmod(folder, 0o755)


def test_a_copy_of_the_folder_is_the_same_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    subprocess.run(["cp", "-r", tmp_path / "a", tmp_path / "b"], check=True)
    save(tmp_path / "a", 2)
    assert value(tmp_path / "b") == 1


@pytest.mark.parametrize("name", ["null\0byte", "x" * 300, "file/below", "file"])
def test_a_folder_that_cannot_be_is_an_error_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(mw.RunError, match="cannot write into"):
        begun(tmp_path / name)
    with pytest.raises(mw.RunError, match="there is no checkpoint"):
        OpenSave.current(tmp_path / name)


def test_locks_are_shared_or_held_alone_and_end_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with path.open() as one, path.open() as other:
        assert try_lock(one.fileno(), shared=True) is True
        assert try_lock(other.fileno(), shared=True) is True
        with path.open() as third:
            assert try_lock(third.fileno(), shared=False) is False
    with path.open() as third, path.open() as fourth:
        assert try_lock(third.fileno(), shared=False) is True
        assert try_lock(fourth.fileno(), shared=True) is False
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    assert try_lock(read, shared=True) is None


def listing(
    meanwhile: Callable[[], object], *, shows: bool
) -> Callable[..., Iterator[os.DirEntry[str]]]:
    """A listing whose first call has others rename meanwhile, and `shows` what was there before."""
    real, calls = os.scandir, count()

    def scandir(path: Path) -> Iterator[os.DirEntry[str]]:
        if next(calls) > 0:
            return real(path)
        entries = list(real(path))
        meanwhile()
        return iter(entries if shows else [])

    return scandir


@pytest.mark.parametrize("shows", [True, False])
def test_a_listing_that_sees_only_what_vanishes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shows: bool
) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(os, "scandir", listing(lambda: save(tmp_path, 2), shows=shows))
    assert [path.name for _, path in checkpoints(tmp_path)] == ["step-2"]


def test_a_save_whose_listing_sees_only_what_vanishes_is_still_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    new = begun(tmp_path)
    monkeypatch.setattr(os, "scandir", listing(lambda: save(tmp_path, 2), shows=True))
    commit(new, 3)
    assert value(tmp_path) == 3

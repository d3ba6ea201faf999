"""The folder: the save before stays until the next is whole, and only what is of no use goes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import meshwright as mw
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.checkpoint import folder as folder_module
from meshwright.runtime.checkpoint.folder import NewSave, OpenSave, remove_unused
from meshwright.runtime.checkpoint.header import Header
from meshwright.runtime.checkpoint.locks import try_lock
from meshwright.runtime.checkpoint.manifest import Manifest, SavedTensor, named_save
from meshwright.runtime.checkpoint.shards import read_header, shard_path, write_shard
from tests.runtime.checkpoint.forks import ended, forked
from tests.runtime.checkpoint.kills import killer
from tests.runtime.processes import environment


def begun(folder: Path) -> NewSave:
    new = NewSave(folder)
    new.begin()
    return new


def commit(new: NewSave, value: float) -> str:
    """Write a tensor and make the save the current one; its name."""
    name, path = new.name, shard_path(new.folder, new.name, 0)
    tensors = {"w": torch.tensor([float(value)])}
    assert new.file is not None
    write_shard(new.file, path, Header.of(name, 0, tensors), tensors)
    saved = SavedTensor((1,), "float32", replicated((1,)), (0,))
    random = {"seed": 0, "step": 0}
    mesh, shards = Mesh((("dp", 1),)), (read_header(path)[0],)
    new.commit(Manifest(name, mesh, random, {"w": "w"}, {"w": saved}, None, shards))
    return name


def save(folder: Path, value: float) -> str:
    return commit(begun(folder), value)


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


def test_a_save_replaces_the_one_before(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert first != second
    assert names(tmp_path) == {"manifest.json", second}
    assert value(tmp_path) == 2


def test_the_save_before_stays_until_the_next_is_whole(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    new = begun(tmp_path)
    assert value(tmp_path) == 1
    new.close()
    assert names(tmp_path) == {"manifest.json", first}
    assert value(tmp_path) == 1


def test_a_save_that_is_read_stays_until_nobody_reads_it(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    with OpenSave.current(tmp_path) as opened:
        second = save(tmp_path, 2)
        assert opened.replaced()
        assert value_of(opened) == 1
        assert names(tmp_path) == {"manifest.json", first, second}
    third = save(tmp_path, 3)
    assert names(tmp_path) == {"manifest.json", third}


def test_saves_side_by_side_leave_the_last_and_do_not_touch_each_other(tmp_path: Path) -> None:
    one, other = begun(tmp_path), begun(tmp_path)
    commit(one, 1)
    assert value(tmp_path) == 1
    assert other.path.is_dir()
    name = commit(other, 2)
    assert value(tmp_path) == 2
    assert names(tmp_path) == {"manifest.json", name}
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
        "print(new.name, flush=True)\n"
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
    second = save(tmp_path, 2)
    assert names(tmp_path) == {"manifest.json", second, dead}
    process.kill()
    process.communicate()
    third = save(tmp_path, 3)
    assert names(tmp_path) == {"manifest.json", third}


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
        before = found
    assert found == number > 15
    name = save(tmp_path, 0)
    assert names(tmp_path) == {"manifest.json", name}


@pytest.fixture
def strangers(tmp_path: Path) -> Iterator[None]:
    """What somebody else put into the folder, and which must stay."""
    hexadecimal = "ab" * 16
    (tmp_path / "notes").mkdir()
    (tmp_path / "000001-00000.safetensors").write_text("a shard of another format")
    (tmp_path / "0123.safetensors").write_text("a model")
    (tmp_path / hexadecimal).mkdir()
    (tmp_path / hexadecimal / "00000.safetensors").write_text("")
    (tmp_path / hexadecimal / "diary.txt").write_text("dear diary")
    (tmp_path / ("cd" * 16)).write_text("a file of our folders' form")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "00000.safetensors").write_text("")
    (tmp_path / ("ef" * 16)).symlink_to(tmp_path / "elsewhere")
    (tmp_path / ("01" * 16)).mkdir()
    (tmp_path / ("01" * 16) / "00000.safetensors").symlink_to(tmp_path / "0123.safetensors")
    (tmp_path / ("23" * 16) / "00000.safetensors").mkdir(parents=True)
    (tmp_path / ("AB" * 16)).mkdir()
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
    (tmp_path / ("ab" * 16)).mkdir()
    (tmp_path / ("cd" * 16)).mkdir()
    (tmp_path / ("cd" * 16) / "00001.safetensors").write_text("of a rank that outlived rank 0")
    name = save(tmp_path, 1)
    assert names(tmp_path) == {"manifest.json", name}


def test_what_a_network_filesystem_keeps_of_an_open_file_does_not_keep_the_others(
    tmp_path: Path,
) -> None:
    kept = tmp_path / save(tmp_path, 1) / ".nfs000000000000002a00000001"
    kept.write_text("")
    second = save(tmp_path, 2)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    kept.unlink()
    third = save(tmp_path, 3)
    assert second != third
    assert names(tmp_path) == {"manifest.json", third}


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
    name = commit(new, 2)
    assert names(tmp_path) == {"manifest.json", name}


def test_a_save_that_begins_while_its_folder_is_looked_at_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    begins, list_files = tmp_path / ("ab" * 16), os.scandir
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
def test_without_locks_only_the_save_before_is_removed(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    other = begun(tmp_path)
    second = save(tmp_path, 2)
    assert names(tmp_path) == {"manifest.json", second, other.name}
    with OpenSave.current(tmp_path) as opened:
        name = commit(other, 3)
        assert names(tmp_path) == {"manifest.json", name}
        with pytest.raises(mw.RunError, match="cannot read `w`"):
            value_of(opened)
        assert opened.replaced()
    assert value(tmp_path) == 3
    assert first != second


@pytest.mark.usefixtures("no_locks")
def test_a_reader_whose_save_vanishes_starts_again_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    read, texts = folder_module.manifest_text, []

    def overtaken(folder: Path) -> str:
        texts.append(read(folder))
        if len(texts) < 4:
            save(tmp_path, len(texts) + 1)
        return texts[-1]

    monkeypatch.setattr(folder_module, "manifest_text", overtaken)
    assert value(tmp_path) == 4
    assert len(texts) == 4


def test_a_save_that_is_current_is_never_removed(tmp_path: Path) -> None:
    name = save(tmp_path, 1)
    remove_unused(tmp_path, name)
    assert value(tmp_path) == 1
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-1])
    remove_unused(tmp_path, name)
    assert (tmp_path / name).is_dir()


def test_an_error_while_the_manifest_is_put_in_place_leaves_the_save_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, new = save(tmp_path, 1), begun(tmp_path)

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(mw.RunError, match=r"cannot write `.*manifest\.json`: Input/output"):
            commit(new, 2)
    new.close()
    assert names(tmp_path) == {"manifest.json", first}
    assert value(tmp_path) == 1


@pytest.mark.parametrize("can_read", [True, False])
def test_an_interruption_after_the_manifest_is_in_place_keeps_the_new_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_read: bool
) -> None:
    save(tmp_path, 1)
    new, replace = begun(tmp_path), os.replace

    def interrupted(*paths: Path) -> None:
        replace(*paths)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            commit(new, 2)
        if not can_read:
            patch.setattr(folder_module, "named_save", lambda _: None)
        new.close()
    assert value(tmp_path) == 2
    third = save(tmp_path, 3)
    assert names(tmp_path) == {"manifest.json", third}


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
    assert named_save(tmp_path) is None

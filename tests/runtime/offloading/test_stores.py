"""Tensors in host memory and in files: they come back as they were, or there is an error."""

from __future__ import annotations

import errno
import os
import time
import weakref
from array import array
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.runtime.errors import RunError
from meshwright.runtime.offloading import disk
from meshwright.runtime.offloading.disk import DiskStore
from meshwright.runtime.offloading.stores import Stores

CPU = torch.device("cpu")
TENSORS = {
    "a matrix": torch.randn(70, 90),
    "a transposed one": torch.randn(70, 90).t(),
    "rows of one": torch.randn(70, 90)[3:50:2, 5:],
    "one row, repeated": torch.randn(1, 90).expand(70, 90),
    "truths": torch.randn(33) > 0,
    "16 bits": torch.randn(33, 5).bfloat16(),
    "complex": torch.randn(7, dtype=torch.complex128),
    "one number": torch.tensor(3.5, dtype=torch.float64),
    "no rows": torch.empty(0, 4),
    "no columns": torch.empty(4, 0),
}


def same(a: Tensor, b: Tensor) -> bool:
    return a.equal(b) and a.stride() == b.stride() and a.dtype == b.dtype


@pytest.mark.parametrize("to", ["host", "disk"])
def test_a_tensor_comes_back_with_its_strides_as_often_as_it_is_fetched(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "CHUNK", 8192)  # so that most need several
    stores = Stores(CPU, 0)
    store = stores(None if to == "host" else str(tmp_path))
    away = {name: store(tensor).wait() for name, tensor in TENSORS.items()}
    for _ in range(2):
        for name, value in away.items():
            back = value.fetch().wait()
            assert same(back, TENSORS[name]), name
            assert back.numel() < 2 or back.data_ptr() != TENSORS[name].data_ptr()
            back.zero_()
    stores.close()


def test_a_value_that_is_fetched_before_it_is_written_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write, go_on = DiskStore(str(tmp_path), CPU, 0), os.pwrite, Event()
    store(torch.randn(10)).wait()

    def wait_and_write(*args: Any) -> int:
        go_on.wait()
        return write(*args)

    monkeypatch.setattr(os, "pwrite", wait_and_write)
    tensor = torch.randn(1000)
    back = store(tensor).result.fetch()
    time.sleep(0.1)  # in which it could be read
    go_on.set()
    assert back.wait().equal(tensor)
    store.close()


def test_a_tensor_in_a_file_is_read_once_what_it_is_to_hold_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write, go_on = DiskStore(str(tmp_path), CPU, 0), os.pwrite, Event()
    home, value = store.hold((1000,), torch.float32), torch.randn(1000)

    def wait_and_write(*args: Any) -> int:
        go_on.wait()
        return write(*args)

    monkeypatch.setattr(os, "pwrite", wait_and_write)
    leaving = store.carry(value, home)
    back = store.bring(home)
    store.ahead(home)
    populated = store._mapping(home).come  # type: ignore[union-attr]
    time.sleep(0.1)  # in which it could be read
    assert not populated.done()
    go_on.set()
    store.wait(home)
    assert home.equal(value) and back.wait().equal(value) and leaving.wait() is home
    store.close()


@pytest.mark.parametrize("to", ["host", "disk"])
def test_a_part_of_a_tensor_that_stays_is_brought_as_a_part(to: str, tmp_path: Path) -> None:
    store = Stores(CPU, 0)(None if to == "host" else str(tmp_path))
    home = store.hold((70, 90), torch.float32).copy_(TENSORS["a matrix"])
    assert store.has(home) and store.has(home[3:]) and not store.has(TENSORS["a matrix"])
    for part in (home[3:], home[:3], home.t(), home[:, 1:5]):
        back = store.bring(part).wait()
        assert back.equal(part) and back.data_ptr() != part.data_ptr()


@pytest.mark.parametrize("to", ["host", "disk"])
def test_what_has_moved_is_let_go_of_on_both_sides(to: str, tmp_path: Path) -> None:
    store = Stores(CPU, 0)(None if to == "host" else str(tmp_path))
    for _ in range(20):
        memory = array("f", bytes(40_000))
        known = weakref.ref(memory)
        leaving = store(torch.frombuffer(memory, dtype=torch.float32))
        del memory
        assert known() is not None
        away = leaving.wait()
        assert known() is None
        block, coming = weakref.ref(away.block), away.fetch()
        del leaving, away
        coming.wait()
        assert block() is None


def test_files_have_no_names_so_that_nothing_is_left_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    stores = Stores(CPU, 0)
    store = stores(str(folder))
    assert isinstance(store, DiskStore) and store is stores(str(folder)) is not stores(None)
    away = store(torch.randn(100)).wait()
    assert folder.is_dir() and not os.listdir(folder)
    assert store.slabs.reserved == os.fstat(store.slabs.slabs[0].fileno()).st_size
    del away
    stores.close()
    assert all(file.closed for file in store.slabs.slabs)


def test_a_folder_may_be_named_from_the_home_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    DiskStore("~/scratch", CPU, 0)(torch.randn(10)).wait()
    assert (tmp_path / "scratch").is_dir()


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_an_error_that_names_the_folder_and_its_room(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(str(tmp_path), CPU, 3)
    store(torch.randn(10)).wait()
    monkeypatch.setattr(os, name, full)
    with pytest.raises(RunError) as caught:
        store(torch.randn(disk.CHUNK * 2)).wait()
    assert caught.value.rank == 3
    assert f"`{tmp_path}`: No space left on device" in str(caught.value)
    assert "free there" in str(caught.value)


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot make a file .*File exists"):
        DiskStore(str(tmp_path / "file"), CPU, 0)(torch.randn(10))


def test_a_file_that_was_cut_is_an_error_and_not_other_numbers(tmp_path: Path) -> None:
    store = DiskStore(str(tmp_path), CPU, 0)
    away = store(torch.randn(10_000)).wait()
    os.truncate(store.slabs.slabs[0].fileno(), 4096)
    with pytest.raises(RunError, match="shorter than what was written"):
        away.fetch().wait()


def test_writes_in_pieces_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, whole = DiskStore(str(tmp_path), CPU, 0), os.pwrite
    value = torch.randn(10_000)
    monkeypatch.setattr(disk.os, "pwrite", lambda f, data, at: whole(f, data[:4096], at))
    assert store(value).wait().fetch().wait().equal(value)

"""Shards by themselves: anyone can open one, and every changed byte of one is found."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import meshwright as mw
from meshwright.runtime.checkpoint.header import Header, check_types
from meshwright.runtime.checkpoint.shards import (
    Shard,
    Shards,
    create_file,
    read_header,
    shard_path,
    write_shard,
)

SAVE = "0123456789abcdef" * 2
TENSORS = {
    "w": torch.arange(6, dtype=torch.float32).view(2, 3),
    "empty": torch.empty(0, 4),
    "number": torch.tensor(5),
    "flag": torch.tensor([True, False, True]),
}


def write(folder: Path, rank: int, tensors: dict[str, torch.Tensor], save: str = SAVE) -> Shard:
    path = shard_path(folder, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with create_file(path) as file:
        digest = write_shard(file, path, Header.of(save, rank, tensors), tensors)
    _, size, header = read_header(path)
    return Shard(size, header, digest)


def read(folder: Path, *shards: Shard, rank: int = 0) -> dict[str, torch.Tensor]:
    opened = Shards(folder, SAVE, shards)
    opened.check()
    return {
        name: opened.part(rank, name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in TENSORS.items()
    }


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted
    )


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    shard = write(tmp_path, 0, TENSORS)
    assert same(read(tmp_path, shard), TENSORS)
    path = shard_path(tmp_path, 0)
    assert same(load_file(path), TENSORS)
    data = path.read_bytes()
    assert shard.digest == hashlib.sha256(data).hexdigest()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    digest = hashlib.sha256(TENSORS["w"].numpy().tobytes()).hexdigest()
    assert header["__metadata__"]["sha256/w"] == digest
    assert header["__metadata__"]["save"] == SAVE
    # As the library does, so that what is mapped is aligned.
    assert int.from_bytes(data[:8], "little") % 8 == 0


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.complex64,
        torch.float8_e4m3fn, torch.float8_e5m2,
    ],
)  # fmt: skip
def test_every_type_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(-8, 8).to(dtype).view(4, 4).t()[1:]
    shard = write(tmp_path, 0, {"w": tensor})
    found = Shards(tmp_path, SAVE, (shard,)).part(0, "w", (3, 4), dtype)
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_every_changed_byte_is_found_and_its_file_named(tmp_path: Path) -> None:
    shard = write(tmp_path, 0, TENSORS)
    path = shard_path(tmp_path, 0)
    data = path.read_bytes()
    for place in range(len(data)):
        for change in (1, 128):
            changed = bytearray(data)
            changed[place] ^= change
            path.write_bytes(changed)
            with pytest.raises(mw.RunError, match=path.name) as caught:
                read(tmp_path, shard)
            if place >= len(data) - 24 - 8 - 3:
                assert any(f"`{name}` in" in str(caught.value) for name in TENSORS)


def test_every_cut_and_an_addition_are_found(tmp_path: Path) -> None:
    shard = write(tmp_path, 0, TENSORS)
    path = shard_path(tmp_path, 0)
    data = path.read_bytes()
    for changed in (*(data[:end] for end in range(len(data))), data + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(mw.RunError, match=path.name):
            read(tmp_path, shard)


def test_a_file_cut_while_it_is_read_is_an_error_not_the_end(tmp_path: Path) -> None:
    shard = write(tmp_path, 0, TENSORS)
    opened = Shards(tmp_path, SAVE, (shard,))
    opened.check()
    path = shard_path(tmp_path, 0)
    os.truncate(path, shard.size - 1)
    with pytest.raises(mw.RunError, match=r"`flag`.*ends too early"):
        opened.part(0, "flag", (3,), torch.bool)


def test_a_shard_of_another_save_or_rank_is_refused(tmp_path: Path) -> None:
    shards = [write(tmp_path, rank, TENSORS) for rank in (0, 1)]
    first, second = (shard_path(tmp_path, rank) for rank in (0, 1))
    aside = tmp_path / "aside"
    for one, other in ((first, aside), (second, first), (aside, second)):
        one.rename(other)
    with pytest.raises(mw.RunError, match=first.name):
        read(tmp_path, *shards)
    with pytest.raises(mw.RunError, match=r"written by rank 1 .* not by rank 0"):
        read(tmp_path, *reversed(shards))
    other_save = "f" * 32
    stranger = write(tmp_path / "other", 0, TENSORS, other_save)
    shard_path(tmp_path / "other", 0).replace(first)
    with pytest.raises(mw.RunError, match=f"in save `{other_save}`"):
        read(tmp_path, stranger, shards[1])


def test_a_shard_written_anew_with_other_values_is_refused(tmp_path: Path) -> None:
    shard, path = write(tmp_path, 0, TENSORS), shard_path(tmp_path, 0)
    path.unlink()
    other = write(tmp_path, 0, {**TENSORS, "w": TENSORS["w"] + 1})
    assert other.size == shard.size
    assert read(tmp_path, other)["w"][0, 0] == 1
    with pytest.raises(mw.RunError, match=f"`{path}` is damaged"):
        read(tmp_path, shard)


def test_a_tensor_that_is_missing_or_of_another_type_is_named(tmp_path: Path) -> None:
    opened = Shards(tmp_path, SAVE, (write(tmp_path, 0, TENSORS),))
    for name, shape, dtype in (
        ("v", (2, 3), torch.float32),
        ("w", (3, 2), torch.float32),
        ("w", (2, 3), torch.int32),
    ):
        with pytest.raises(mw.RunError, match=f"`{name}`"):
            opened.part(0, name, shape, dtype)


def test_a_type_that_the_format_lacks_is_refused_by_name() -> None:
    with pytest.raises(mw.RunError, match=r"`w` has type `torch\.complex128`"):
        check_types({"w": torch.zeros(2, dtype=torch.complex128)})


ROW = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
META = {"save": SAVE, "rank": "0", "sha256/w": "0" * 64, "sha256/v": "0" * 64}


def of(changes: dict[str, Any]) -> dict[str, Any]:
    return {"__metadata__": META, "w": {**ROW, **changes}}


TWICE = json.dumps({"__metadata__": META, "w": ROW, "x": ROW}).replace("x", "w").encode()
HEADERS: dict[str, Any] = {
    "no JSON": b"{",
    "a list": [],
    "nested too deeply": b"[" * 100_000,
    "no metadata": {"w": ROW},
    "metadata that is text": {"__metadata__": "", "w": ROW},
    "no save": {"__metadata__": {"rank": "0", "sha256/w": "0" * 64}, "w": ROW},
    "no digest": {"__metadata__": {"save": SAVE, "rank": "0"}, "w": ROW},
    "a digest that is short": {"__metadata__": {**META, "sha256/w": "00"}, "w": ROW},
    "a rank that is a word": {"__metadata__": {**META, "rank": "first"}, "w": ROW},
    "a tensor twice": TWICE,
    "an unknown type": of({"dtype": "U7"}),
    "a type that is a list": of({"dtype": []}),
    "a size below zero": of({"shape": [-8]}),
    "a size of NaN": of({"shape": [float("nan")]}),
    "a size that is true": of({"shape": [True, 8]}),
    "a million dims": of({"shape": [1] * 100_000}),
    "sizes without end": of({"shape": [2**62] * 64}),
    "another size": of({"shape": [7]}),
    "more than there is": of({"shape": [9], "data_offsets": [0, 9]}),
    "less than there is": of({"shape": [7], "data_offsets": [0, 7]}),
    "a gap": of({"shape": [7], "data_offsets": [1, 8]}),
    "bytes of two": {"__metadata__": META, "w": ROW, "v": ROW},
    "an offset too many": of({"data_offsets": [0, 8, 8]}),
    "an entry too many": of({"more": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, case: str) -> None:
    header = HEADERS[case]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "shard"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(mw.RunError, match=f"`{path}` is damaged"):
        read_header(path)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "U63"}, {"dtype": []}, {"shape": 3}, {"shape": [9]}, {"data_offsets": [0]}, None],
)
def test_the_tensor_whose_entry_makes_no_sense_is_named(
    tmp_path: Path, changes: dict[str, Any] | None
) -> None:
    row = {} if changes is None else {**ROW, **changes}
    text = json.dumps({"__metadata__": META, "w": row}).encode()
    (tmp_path / "shard").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8)
    with pytest.raises(mw.RunError, match="is damaged: `w`: "):
        read_header(tmp_path / "shard")


@pytest.mark.parametrize("length", [0, 1, 100, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused_at_once(tmp_path: Path, length: int) -> None:
    path = tmp_path / "shard"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(mw.RunError, match=f"a header of {length} bytes"):
        read_header(path)
    path.write_bytes(b"12")
    with pytest.raises(mw.RunError, match="is damaged"):
        read_header(path)


MAKERS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a link to nothing": lambda path: os.symlink("nothing", path),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "00000.safetensors"
    MAKERS[kind](path)
    with pytest.raises(mw.RunError, match=f"cannot read `{path}`"):
        read_header(path)

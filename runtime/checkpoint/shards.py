"""Shards on disk: each rank's tensors in one safetensors file, with a SHA-256 of each tile."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from meshwright.runtime.checkpoint.files import (
    COPY_AGAIN,
    MAKE_ROOM,
    bytes_of,
    cannot,
    read_all,
    read_bytes,
    regular_file,
    size_of,
    write_all,
)
from meshwright.runtime.checkpoint.header import Header, Held, header_length
from meshwright.runtime.checkpoint.tiles import Tiles
from meshwright.runtime.errors import RunError


@dataclass(frozen=True, slots=True)
class Shard:
    """What the manifest says of a file: bytes, SHA-256 of its header, SHA-256 of all of it."""

    size: int
    header: str
    digest: str


def shard_path(folder: Path, rank: int) -> Path:
    """The file that a rank writes in the folder of a checkpoint."""
    return folder / f"{rank:05}.safetensors"


def digest_path(folder: Path, rank: int) -> Path:
    """The file in which a rank says that its own is whole, while the others write."""
    return folder / f"{rank:05}.sha256"


def create_file(path: Path) -> BinaryIO:
    """A new file to write; it must not be there yet. Raises `OSError`."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    return open(number, "r+b", buffering=0)


class ShardWriter:
    """A file under way. Its header comes last: a file that was not finished has none."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._start = len(header.to_bytes())
        self._digests: dict[str, str] = {}

    def write(self, file: BinaryIO, name: str, tensor: Tensor) -> None:
        """Write a tensor into its place. Raises `OSError`."""
        file.seek(self._start + self.header.tensors[name].start)
        data = write_tensor(file, tensor)
        self._digests[name] = "".join(Tiles(data.shape, data.itemsize).digests(data))

    def finish(self, file: BinaryIO) -> bytes:
        """Write the header, flush the file to the disk, and return the header's text."""
        held = self.header.tensors
        found = {name: replace(held[name], digest=self._digests[name]) for name in held}
        text = replace(self.header, tensors=found).to_bytes()
        file.seek(0)
        for _ in write_all(file, memoryview(text)):
            pass
        os.fsync(file.fileno())
        return text


def write_shard(file: BinaryIO, path: Path, header: Header, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors that `header` describes into a new file, and flush it to the disk.

    Returns the SHA-256 of the file. Raises `RunError`.
    """
    writer = ShardWriter(path, header)
    try:
        for name, tensor in tensors.items():
            writer.write(file, name, tensor)
        text = writer.finish(file)
    except OSError as error:
        raise cannot("write", path, error, MAKE_ROOM) from None
    digest = hashlib.sha256(text)
    for tensor in tensors.values():
        data = _on_cpu(tensor)
        digest.update(bytes_of(data))
    return digest.hexdigest()


def write_tensor(file: BinaryIO, tensor: Tensor) -> Tensor:
    """Write a tensor's bytes where a file stands, and return it as it was written.

    Raises `OSError`.
    """
    data = _on_cpu(tensor)
    for _ in write_all(file, bytes_of(data)):
        pass
    return data


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def read_header(path: Path, expected: Shard | None = None) -> tuple[Header, int, str]:
    """The header of a shard, the bytes of the file and the SHA-256 of the header.

    They must be as `expected` if that is given.

    Raises `RunError` for what is not a whole file of ours.
    """
    try:
        with regular_file(path) as file:
            size = size_of(file)
            if expected is not None and size != expected.size:
                raise ValueError(f"it has {size} bytes, not {expected.size}")
            first = read_bytes(file, min(8, size))
            text = read_bytes(file, header_length(first, size))
        digest = hashlib.sha256(first + text).hexdigest()
        if expected is not None and digest != expected.header:
            raise ValueError("its header is not the one that was saved")
        header = Header.parse(text)
        if size != 8 + len(text) + header.num_bytes:
            raise ValueError(f"its tensors do not fill its {size} bytes")
    except OSError as error:
        raise cannot("read", path, error, COPY_AGAIN) from None
    except ValueError as error:
        raise RunError(f"`{path}` is damaged: {error}", help=COPY_AGAIN) from None
    return header, size, digest


class Shards:
    """The files of one checkpoint, opened when they are needed; all that is read is checked.

    They are not mapped into memory: truncating a mapped file ends the process that reads it.
    """

    def __init__(self, folder: Path, save: str, shards: Sequence[Shard]) -> None:
        self.folder, self.save, self.shards = folder, save, shards
        self._headers: dict[int, tuple[Path, int, Header]] = {}

    def check(self) -> None:
        """Raise `RunError` unless every file is there, has its size and the header it was given."""
        for rank in range(len(self.shards)):
            self._header(rank)

    def part(
        self,
        rank: int,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        needed: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """A tensor of the file that `rank` wrote.

        With `needed`, the indices along each dim, the tiles that have no such element are not read,
        and their elements are arbitrary. Raises `RunError` naming file and tensor unless what is
        read is there as it was saved.
        """
        path, start, _ = self._header(rank)
        held = self.described(rank, name, shape, dtype)
        tensor = torch.empty(shape, dtype=dtype)
        tiles = Tiles(shape, dtype.itemsize)
        touched = tiles.touched(needed) if needed is not None else tiles.all
        try:
            _read(path, start + held.start, bytes_of(tensor), tiles.runs(touched))
        except OSError as error:
            raise cannot(f"read `{name}` from", path, error, COPY_AGAIN) from None
        if any(tiles.digest(tensor, at) != held.digest_of(n) for n, at in tiles.places(touched)):
            raise RunError(
                f"`{name}` in `{path}` is damaged: its bytes are not those that were saved",
                help=COPY_AGAIN,
            )
        return tensor

    def names(self, rank: int) -> Iterable[str]:
        """The tensors in the file that `rank` wrote."""
        return self._header(rank)[2].tensors

    def held(self, rank: int, name: str) -> Held:
        """A tensor as the file that `rank` wrote describes it. Raises `RunError` without one."""
        path, _, header = self._header(rank)
        found = header.tensors.get(name)
        if found is None:
            raise RunError(f"`{path}` has no `{name}`", help=COPY_AGAIN)
        return found

    def described(self, rank: int, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Held:
        """Where a tensor is. Raises `RunError` unless the file has it of this shape and type."""
        held = self.held(rank, name)
        if (held.shape, held.dtype) != (shape, dtype):
            raise RunError(
                f"`{name}` in `{shard_path(self.folder, rank)}` is {held.dtype} "
                f"{list(held.shape)}, and the manifest has it as {dtype} {list(shape)}",
                help=COPY_AGAIN,
            )
        return held

    def check_bytes(self, rank: int) -> None:
        """Raise `RunError`, naming the tensor, unless every byte of a file is as it was saved."""
        path, start, header = self._header(rank)
        try:
            with regular_file(path) as file:
                whole = hashlib.sha256(read_bytes(file, start))
        except OSError as error:
            raise cannot("read", path, error, COPY_AGAIN) from None
        for name, held in sorted(header.tensors.items(), key=lambda each: each[1].start):
            tensor = self.part(rank, name, held.shape, held.dtype)
            whole.update(bytes_of(tensor))
        if whole.hexdigest() != self.shards[rank].digest:
            raise RunError(
                f"`{path}` is damaged: its SHA-256 is not the one in the manifest", help=COPY_AGAIN
            )

    def _header(self, rank: int) -> tuple[Path, int, Header]:
        """The file, where its tensors begin, and what it says of itself."""
        if rank not in self._headers:
            path = shard_path(self.folder, rank)
            header, size, _ = read_header(path, self.shards[rank])
            check_origin(path, header, self.save, rank)
            self._headers[rank] = path, size - header.num_bytes, header
        return self._headers[rank]


def check_origin(path: Path, header: Header, save: str, rank: int) -> None:
    """Raise `RunError` for a file of another save or another rank."""
    if (header.save, header.rank) != (save, rank):
        raise RunError(
            f"`{path}` was written by rank {header.rank} in save `{header.save}`, "
            f"not by rank {rank} in save `{save}`",
            help=COPY_AGAIN,
        )


def _read(path: Path, start: int, target: memoryview, runs: Iterable[tuple[int, int]]) -> None:
    """Fill these runs of `target` from a file in which it begins at `start`."""
    with regular_file(path) as file:
        for first, last in runs:
            file.seek(start + first)
            for _ in read_all(file, target[first:last]):
                pass

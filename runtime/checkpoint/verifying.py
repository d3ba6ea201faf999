"""Check a checkpoint without a run: every byte of every file, and that no element is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.checkpoint.extra import read_extra
from meshwright.runtime.checkpoint.files import COPY_AGAIN
from meshwright.runtime.checkpoint.fitting import check_names
from meshwright.runtime.checkpoint.folder import OpenSave, folder_of
from meshwright.runtime.checkpoint.header import dtype_of
from meshwright.runtime.checkpoint.manifest import MANIFEST, Manifest, manifest_text
from meshwright.runtime.checkpoint.optimizer_loading import check_whole
from meshwright.runtime.checkpoint.parts import check_size, read_whole, saved_parts, taken
from meshwright.runtime.checkpoint.shards import Shards, shard_path
from meshwright.runtime.errors import RunError


def verify(path: str | Path) -> tuple[Manifest | None, list[str]]:
    """What the checkpoint in the folder `path` says, and all that is wrong with it, in words.

    Every byte is read and compared with its digest; the parts of each tensor must have its type,
    and cover it. No more is held than one tensor. The manifest is None where it cannot be read.
    """
    folder = folder_of(path)
    while True:
        try:
            opened = OpenSave(folder, manifest_text(folder))
        except RunError as error:
            return None, [_spelled(error)]
        with apart_from_caller("cpu"), opened:
            found = [_spelled(error) for error in _problems(opened.manifest, opened.shards)]
            # Where the filesystem has no locks, another save may have taken this one's place.
            if not (found and opened.replaced()):
                return opened.manifest, found


def _spelled(error: RunError) -> str:
    return "\n".join([error.problem, *(f"  {line}" for line in error.where)])


def _problems(manifest: Manifest, shards: Shards) -> Iterator[RunError]:
    """What is wrong, a file or tensor at a time."""
    wanted: list[set[str]] = [set() for _ in manifest.shards]
    for name, saved in manifest.tensors.items():
        for owner in saved.owners:
            wanted[owner].add(name)
    unread: set[int] = set()
    for rank, names in enumerate(wanted):
        for error in _raised(_check_file, shards, manifest, rank, names):
            unread.add(rank)
            yield error
    for error in _raised(_check_manifest, manifest, shards.folder):
        error.where = (f"in `{shards.folder / MANIFEST}`", *error.where)
        yield error
    for name, saved in manifest.tensors.items():
        if unread.isdisjoint(saved.owners):
            yield from _raised(_check_tensor, name, manifest, shards)


def _raised(check: Callable[..., None], *args: object) -> Iterator[RunError]:
    try:
        check(*args)
    except RunError as error:
        yield error


def _check_manifest(manifest: Manifest, folder: Path) -> None:
    """Raise `RunError` for what a manifest says that is not about its files."""
    check_names(manifest, folder)
    read_extra(manifest.extra)
    check_whole(manifest)


def _check_file(shards: Shards, manifest: Manifest, rank: int, wanted: set[str]) -> None:
    """Raise `RunError` unless a file is the one that was saved, and has no other tensors."""
    if unknown := sorted(set(shards.names(rank)) - wanted):
        raise RunError(
            f"`{shard_path(shards.folder, manifest.save, rank)}` has `{unknown[0]}`, of which the "
            "manifest does not know",
            help=COPY_AGAIN,
        )


def _check_tensor(name: str, manifest: Manifest, shards: Shards) -> None:
    """Raise `RunError` unless all parts of a tensor are as they were saved, and cover it.

    Its layout covers it: what a manifest says of layouts was checked as it was read. Where parts
    share elements, their values must be the same.
    """
    saved, dtype = manifest.tensors[name], dtype_of(manifest.tensors[name].dtype)
    shares = check_size(name, manifest, shards) > math.prod(saved.shape)
    whole = read_whole(name, manifest, shards) if shares else None
    for owner, given in saved_parts(saved, manifest.mesh):
        part = shards.part(owner, name, tuple(map(len, given)), dtype)
        if whole is not None and not _same_bytes(part, taken(whole, given)):
            raise RunError(
                f"`{name}` has elements that two parts share, with other values in "
                f"`{shard_path(shards.folder, manifest.save, owner)}` than elsewhere",
                help="load another checkpoint: ranks did not hold the same values",
            )


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))

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
from meshwright.runtime.checkpoint.folder import OpenSave
from meshwright.runtime.checkpoint.header import dtype_of
from meshwright.runtime.checkpoint.manifest import MANIFEST, Manifest, manifest_text
from meshwright.runtime.checkpoint.optimizer_loading import check_whole
from meshwright.runtime.checkpoint.parts import check_size, read_whole, saved_parts, taken
from meshwright.runtime.checkpoint.shards import Shards, shard_path
from meshwright.runtime.errors import RunError


def verify(path: Path) -> tuple[Manifest | None, list[str]]:
    """What the checkpoint in the folder `path` says, and all that is wrong with it, in words.

    Every byte is read and compared with its digests; the parts of each tensor must have its type,
    and cover it. A few MiB are held at once. The manifest is None where it cannot be read.
    """
    try:
        opened = OpenSave(path, manifest_text(path))
    except RunError as error:
        return None, [str(error)]
    with apart_from_caller("cpu"), opened:
        problems = list(_problems(opened.manifest, opened.shards))
        return opened.manifest, [
            "\n".join([e.problem, *map("  {}".format, e.where)]) for e in problems
        ]


def _problems(manifest: Manifest, shards: Shards) -> Iterator[RunError]:
    """What is wrong, a file or tensor at a time."""
    wanted: list[set[str]] = [set() for _ in manifest.shards]
    for name, saved in manifest.tensors.items():
        for owner in saved.owners:
            wanted[owner].add(name)
    unread: set[int] = set()
    for rank, names in enumerate(wanted):
        for error in _raised(_check_file, shards, rank, names):
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


def _check_file(shards: Shards, rank: int, wanted: set[str]) -> None:
    """Raise `RunError` unless a file is the one that was saved, and has no other tensors."""
    shards.check_bytes(rank)
    if unknown := sorted(set(shards.names(rank)) - wanted):
        raise RunError(
            f"`{shard_path(shards.folder, rank)}` has `{unknown[0]}`, which the manifest has not",
            help=COPY_AGAIN,
        )


def _check_tensor(name: str, manifest: Manifest, shards: Shards) -> None:
    """Raise `RunError` unless the parts of a tensor are as its layout has them, and cover it.

    The layout covers it: what a manifest says of layouts was checked as it was read. Where parts
    share elements, their values must be the same.
    """
    saved, dtype = manifest.tensors[name], dtype_of(manifest.tensors[name].dtype)
    shared = check_size(name, manifest, shards) > math.prod(saved.shape)
    whole = read_whole(name, manifest, shards) if shared else None
    for owner, given in saved_parts(saved, manifest.mesh):
        shape = tuple(map(len, given))
        shards.described(owner, name, shape, dtype)
        if whole is None or _same_bytes(
            shards.part(owner, name, shape, dtype), taken(whole, given)
        ):
            continue
        raise RunError(
            f"`{name}` has elements that two parts share, with other values in "
            f"`{shard_path(shards.folder, owner)}` than elsewhere",
            help="load another checkpoint: ranks did not hold the same values",
        )


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))

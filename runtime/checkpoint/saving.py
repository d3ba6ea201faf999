"""Write a checkpoint: each rank a file with the parts that it owns, rank 0 the manifest.

Files of a save have a number of their own, and the manifest is replaced last: a save that fails
leaves the one before as it was.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from meshwright.compiler.collectives import Wire
from meshwright.compiler.program import Program
from meshwright.runtime.checkpoint.manifest import MANIFEST, Manifest, read_manifest, shard_name
from meshwright.runtime.checkpoint.optimizer_state import check_optimizer, optimizer_entries
from meshwright.runtime.checkpoint.parts import Entry, own_parts
from meshwright.runtime.checkpoint.shards import write_shard
from meshwright.runtime.errors import RunError
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.weights import stored_tensors

_SHARD = re.compile(r"(\d{6})-\d{5}\.safetensors")


def save(
    program: Program, states: Sequence[RankState], path: Path, optimizer: Optimizer | None
) -> list[RankProgram]:
    """What each rank of this process does to write a checkpoint."""
    options = None
    if optimizer is not None:
        options = check_optimizer(program, states, optimizer)
    return [_save(program, state, path, optimizer, options) for state in states]


def _save(
    program: Program,
    state: RankState,
    path: Path,
    optimizer: Optimizer | None,
    options: dict[str, Any] | None,
) -> RankProgram:
    every_axis, first = state.mesh.names, state.rank == 0
    told = torch.zeros(1, dtype=torch.int64, device=state.device)
    if first:
        told += _next_number(path)
    number = int((yield Wire("broadcast", every_axis), told))
    entries = _entries(program, state, optimizer)
    write_shard(path / shard_name(number, state.rank), own_parts(entries, state))
    yield Wire("all_reduce", every_axis), torch.zeros(1, device=state.device)
    if first:
        random = {"seed": state.random.seed, "step": state.random.step}
        aliases = dict(program.captured.aliases)
        manifest = Manifest.of(number, state.mesh, random, aliases, entries, options)
        _replace(path / MANIFEST, manifest.to_json())
        _remove_others(path, number)
    yield Wire("all_reduce", every_axis), torch.zeros(1, device=state.device)


def _entries(program: Program, state: RankState, optimizer: Optimizer | None) -> list[Entry]:
    found = [
        Entry.of(stored, state.tensors[kind, stored.name])
        for kind, stored in stored_tensors(program)
    ]
    if optimizer is not None:
        found += optimizer_entries(program, state, optimizer)
    return found


def _next_number(path: Path) -> int:
    """The number of a new save into this folder, which is made if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot write into `{path}`: {error.strerror}", help="name a folder to write into"
        ) from None
    if not (path / MANIFEST).exists():
        return 1
    return read_manifest(path).number % 999_999 + 1


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one."""
    temporary = path.with_suffix(".new")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(
            f"cannot write `{path}`: {error.strerror}",
            help="make room there, or name another folder",
        ) from None


def _remove_others(path: Path, number: int) -> None:
    for file in path.iterdir():
        found = _SHARD.fullmatch(file.name)
        if found and int(found[1]) != number:
            file.unlink(missing_ok=True)

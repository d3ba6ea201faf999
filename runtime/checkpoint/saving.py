"""Write a checkpoint: each rank writes a file with the parts that it owns, rank 0 the manifest.

What can fail on one rank is done between collectives, and raised on all. The save before stays as
it was until this one is whole, on the disk, and named by the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from meshwright.compiler.public import Program
from meshwright.runtime.checkpoint.extra import written_extra
from meshwright.runtime.checkpoint.files import cannot
from meshwright.runtime.checkpoint.folder import NewSave, folder_of
from meshwright.runtime.checkpoint.header import Header, check_types
from meshwright.runtime.checkpoint.manifest import Manifest, SavedTensor
from meshwright.runtime.checkpoint.optimizer_state import (
    check_optimizer,
    optimizer_entries,
    unlike_first,
)
from meshwright.runtime.checkpoint.parts import Entry, own_parts, saved_tensors
from meshwright.runtime.checkpoint.shards import (
    Shard,
    check_origin,
    create_file,
    read_header,
    shard_path,
    write_shard,
)
from meshwright.runtime.errors import RunError
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.weights import stored_tensors
from meshwright.runtime.world.agreement import agree, agreed, first_says, told

_ONE_FOLDER = "give every rank one folder, on a filesystem that all of them share"


def save(
    program: Program, states: Sequence[RankState], path: Any, optimizer: Any, extra: Any = None
) -> list[RankProgram]:
    """What each rank of this process does to write a checkpoint; `extra` is that of rank 0."""
    # On the virtual mesh there is one optimizer for all ranks.
    found: list[dict[str, Any]] = []

    def options() -> dict[str, Any] | None:
        if optimizer is not None and not found:
            found.append(check_optimizer(program, states, optimizer))
        return found[0] if found else None

    return [_save(program, state, path, optimizer, options, extra) for state in states]


def _save(
    program: Program,
    state: RankState,
    path: Any,
    optimizer: Optimizer | None,
    options: Callable[[], dict[str, Any] | None],
    extra: Any,
) -> RankProgram:
    def prepare() -> tuple[NewSave, dict[str, Any], list[Entry], dict[str, Tensor]]:
        new = NewSave(folder_of(path))
        checked = {"optimizer": options(), "extra": written_extra(extra)}
        entries = _entries(program, state, optimizer)
        parts = own_parts(entries, state)
        check_types(parts)
        return new, checked, entries, parts

    def commit() -> str:
        tensors = saved_tensors(entries, state.mesh)
        shards = _whole_shards(new.folder, name, state.mesh.num_ranks, tensors)
        manifest = Manifest(
            save=name,
            mesh=state.mesh,
            random={"seed": state.random.seed, "step": state.random.step},
            aliases=dict(program.captured.aliases),
            tensors=tensors,
            shards=shards,
            **checked,
        )
        new.commit(manifest)
        return name

    new, checked, entries, parts = yield from agreed(state, prepare, "save")
    own = {"progress": state.progress, "optimizer": checked["optimizer"]}
    first = json.loads((yield from told(state, json.dumps(own))))
    problem = unlike_first(own["optimizer"], first["optimizer"])
    yield from agree(state, problem or _not_abreast(own["progress"], first["progress"]))
    try:
        name = yield from first_says(state, new.begin)
        yield from agreed(state, lambda: _write(new, name, state.rank, parts))
        yield from first_says(state, commit)
    finally:
        new.close()


def _not_abreast(own: Sequence[int], first: Sequence[int]) -> RunError | None:
    """The error where this rank has made more or fewer steps than rank 0: parts would not fit."""
    for ours, theirs, what in zip(own, first, ("steps", "steps of the optimizer"), strict=True):
        if ours != theirs:
            return RunError(
                f"this rank has made {ours} {what}, and rank 0 {theirs}",
                help="call `save` after the same step on every rank, not where a signal came",
            )
    return None


def _entries(program: Program, state: RankState, optimizer: Optimizer | None) -> list[Entry]:
    found = [
        Entry.of(stored, state.tensors[kind, stored.name])
        for kind, stored in stored_tensors(program)
    ]
    if optimizer is not None:
        found += optimizer_entries(program, state, optimizer)
    return found


def _write(new: NewSave, name: str, rank: int, parts: dict[str, Tensor]) -> None:
    """Write this rank's file; that of rank 0 has been open since the save began."""
    shard, header = shard_path(new.folder, name, rank), Header.of(name, rank, parts)
    if new.file is not None:
        write_shard(new.file, shard, header, parts)
        return
    try:
        file = create_file(shard)
    except FileNotFoundError:
        raise RunError(
            f"cannot write `{shard}`: the folder that rank 0 made is not there", help=_ONE_FOLDER
        ) from None
    except OSError as error:
        raise cannot("write", shard, error, "name a folder to write into") from None
    with file:
        write_shard(file, shard, header, parts)


def _whole_shards(
    path: Path, name: str, num_ranks: int, tensors: Mapping[str, SavedTensor]
) -> tuple[Shard, ...]:
    """The files of all ranks. Raises `RunError` unless each is there with all that it should have.

    This is where it shows that a rank wrote into another folder than rank 0, or held other tensors.
    """
    wanted: list[dict[str, str]] = [{} for _ in range(num_ranks)]
    for tensor, saved in tensors.items():
        for owner in saved.owners:
            wanted[owner][tensor] = saved.dtype
    return tuple(_whole_shard(path, name, rank, wanted[rank]) for rank in range(num_ranks))


def _whole_shard(path: Path, name: str, rank: int, wanted: Mapping[str, str]) -> Shard:
    file = shard_path(path, name, rank)
    if not os.path.exists(file):
        raise RunError(f"`{file}`, which rank {rank} wrote, is not there", help=_ONE_FOLDER)
    shard, header = read_header(file)
    check_origin(file, header, name, rank)
    for tensor in sorted(wanted.keys() | header.tensors.keys()):
        held = header.tensors.get(tensor)
        wrote = "no" if held is None else str(held.dtype).removeprefix("torch.")
        has = f"as {wanted[tensor]}" if tensor in wanted else "on another rank, or not at all"
        if f"as {wrote}" != has:
            raise RunError(
                f"rank {rank} wrote {wrote} `{tensor}`, which rank 0 has {has}",
                help="give every rank the same optimizer, in the same state",
            )
    return shard

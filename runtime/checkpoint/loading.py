"""Read a checkpoint that any plan wrote into the ranks of any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch.optim import Optimizer

from meshwright.compiler.program import Program
from meshwright.runtime.checkpoint.folder import OpenSave
from meshwright.runtime.checkpoint.optimizer_state import check_optimizer, restore
from meshwright.runtime.checkpoint.parts import Entry, read_into
from meshwright.runtime.rank import RankState
from meshwright.runtime.weights import check_state, name_in, stored_tensors


def load(
    program: Program, states: Sequence[RankState], path: Path, optimizer: Optimizer | None
) -> None:
    """Read a checkpoint into the ranks of this process."""
    with OpenSave.current(path) as opened:
        _load(program, states, path, optimizer, opened)


def _load(
    program: Program,
    states: Sequence[RankState],
    path: Path,
    optimizer: Optimizer | None,
    opened: OpenSave,
) -> None:
    manifest, shards = opened.manifest, opened.shards
    shapes = {
        alias: manifest.tensors[name].shape
        for alias, name in manifest.aliases.items()
        if name in manifest.tensors
    }
    check_state(program, shapes, f"the checkpoint `{path}`")
    if optimizer is not None:
        check_optimizer(program, states, optimizer)
    for state in states:
        for kind, stored in stored_tensors(program):
            name = name_in(program, stored.name, shapes)
            if name is not None:
                entry = Entry.of(stored, state.tensors[kind, stored.name])
                read_into(entry, manifest.aliases[name], manifest, shards, state)
        state.random.seed = manifest.random["seed"]
        state.random.step = manifest.random["step"]
    if optimizer is not None:
        restore(program, states, optimizer, manifest, shards)

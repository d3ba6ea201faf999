"""Read a checkpoint that any plan wrote into the ranks of any other: all of it or nothing.

Rank 0 reads the manifest for all, so that a save meanwhile cannot give ranks different ones. Each
rank then reads and checks what it is to hold, into new memory; only when every rank has all of that
is anything changed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from meshwright.compiler.codegen.linking import LossScale
from meshwright.compiler.public import Program
from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.checkpoint.extra import read_extra
from meshwright.runtime.checkpoint.fitting import check_dtypes, check_model, model_tensors
from meshwright.runtime.checkpoint.folder import OpenSave, folder_of, has_none, renamed
from meshwright.runtime.checkpoint.manifest import MANIFEST, Manifest
from meshwright.runtime.checkpoint.optimizer_loading import (
    SavedOptimizer,
    State,
    saved_optimizer,
    staged_state,
)
from meshwright.runtime.checkpoint.optimizer_state import check_owner
from meshwright.runtime.checkpoint.parts import Entry, read_into, read_whole
from meshwright.runtime.checkpoint.pretrained import read_weights, weights_in
from meshwright.runtime.errors import MismatchError, RunError
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.state.weights import name_in
from meshwright.runtime.world.agreement import agreed, first_says, told

_ATTEMPTS = 5


def load(
    program: Program,
    states: Sequence[RankState],
    path: Any,
    optimizer: Any,
    *,
    missing_ok: bool = False,
) -> list[RankProgram]:
    """What each rank of this process does to take over a checkpoint; gives what was in `extra`.

    With `missing_ok` that is empty, and nothing else happens, where rank 0 finds no checkpoint.

    Until all ranks have everything, each holds a second copy: of its parameters and buffers in CPU
    memory, of the optimizer's state on the device.
    """
    reader = _Reader(program, states, path, optimizer, missing_ok=bool(missing_ok))
    return [_load(reader, state) for state in states]


def _load(reader: _Reader, state: RankState) -> RankProgram:
    try:
        staged = yield from _staged(reader, state)
    finally:
        reader.close()
    if staged is None:
        return {}
    staged.give()
    return staged.extra


def _staged(reader: _Reader, state: RankState) -> RankProgram:
    """What this rank takes over, once every rank has read its part; None if there is nothing."""
    attempts = _ATTEMPTS
    while True:
        yield from agreed(state, reader.check_arguments, "load")
        found: str = yield from first_says(state, reader.current)
        if not found:
            return None
        kind = yield from told(state, _spell(reader.optimizer))
        try:
            return (yield from agreed(state, partial(reader.staged, state, found, kind)))
        except RunError:
            # Where the filesystem has no locks, another save may have taken this one's place.
            attempts -= 1
            gone: str = yield from told(state, "gone" if reader.gone() else "")
            if not gone or not attempts:
                raise


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The global tensors of a checkpoint or of safetensors files, by name, in CPU memory.

    - A checkpoint: `path` is as for `Run.load`, the folder of one or, for the newest, of several.
      It gives parameters and buffers, also those that are not persistent.
    - Weights as Hugging Face keeps them: a folder with `model.safetensors`, or with
      `model.safetensors.index.json` and the files that it names; or one such file. The tensors are
      mapped from the files: `program.launch(state_dict=...)` reads on each rank no more than that
      holds. The files must stay as they are meanwhile, and be the same for every rank.

    Needs no model, plan or mesh. Raises `RunError` for what is damaged, pickled or not there.
    """
    folder = folder_of(path)
    with apart_from_caller("cpu"):
        if (folder.is_file() or has_none(folder)) and (weights := weights_in(folder)):
            return read_weights(weights)
        with OpenSave.current(folder) as opened:
            manifest = opened.manifest
            found = {
                name: read_whole(name, manifest, opened.shards) for name in model_tensors(manifest)
            }
            return {alias: found[name] for alias, name in manifest.aliases.items() if name in found}


@dataclass(frozen=True, slots=True)
class _Staged:
    """What one rank takes over."""

    random: dict[str, int]
    loss_scale: LossScale
    extra: dict[str, Any]
    saved: SavedOptimizer | None
    state: RankState
    tensors: dict[tuple[str, str], Tensor]
    optimizer: Optimizer | None
    kept: State

    def give(self) -> None:
        """Change what the rank holds; what could fail was done before."""
        for which, tensor in self.tensors.items():
            self.state.assign(which, tensor)
        self.state.unset.clear()
        self.state.random.seed = self.random["seed"]
        self.state.random.step = self.random["step"]
        self.state.num_updates = self.random["num_updates"]
        for name, value in asdict(self.loss_scale).items():
            setattr(self.state.loss_scale, name, value)
        if self.optimizer is None or self.saved is None:
            return
        self.saved.give_options(self.optimizer)
        for parameter, kept in self.kept.items():
            self.optimizer.state.pop(parameter, None)
            if kept:
                self.optimizer.state[parameter] = kept


class _Reader:
    """One load by the ranks of this process."""

    def __init__(
        self,
        program: Program,
        states: Sequence[RankState],
        path: Any,
        optimizer: Any,
        *,
        missing_ok: bool,
    ) -> None:
        self.program, self.states = program, states
        self.path, self.optimizer, self.missing_ok = path, optimizer, missing_ok
        self.opened: OpenSave | None = None
        self._saved: SavedOptimizer | None = None
        self._fits = False
        """Whether the open save has been compared with the model and the optimizer."""

    def check_arguments(self) -> None:
        """Raise `RunError` for a path or an optimizer that is not one."""
        folder_of(self.path)
        if self.optimizer is not None:
            check_owner(self.states, self.optimizer)

    def current(self) -> str:
        """The name below the path of the checkpoint to load, and the text of its manifest.

        All of its files are in place. Empty where there is none, and that is accepted.
        """
        self.close()
        folder = folder_of(self.path)
        if self.missing_ok and has_none(folder) and not renamed(folder):
            return ""
        self.opened, self._fits = OpenSave.current(folder), False
        name = os.path.relpath(self.opened.path, folder)
        return f"{name}\n{self.opened.text}"

    def gone(self) -> bool:
        """Whether the checkpoint that was opened was removed for newer ones."""
        return self.opened is not None and self.opened.gone(folder_of(self.path))

    def close(self) -> None:
        """Unlock the save, so that it can be removed once it is not the current one."""
        if self.opened is not None:
            self.opened.close()

    def staged(self, state: RankState, found: str, kind: str) -> _Staged:
        """Read all that `state` is to hold of the checkpoint that rank 0 `found`.

        Raises `RunError` where that is damaged, does not fit, or where rank 0 loads it with another
        `kind` of optimizer.
        """
        if (own := _spell(self.optimizer)) != kind:
            raise MismatchError(
                f"`load` was called {own}, and on rank 0 {kind}",
                help="call `load` with the same arguments on every rank",
            )
        below, _, text = found.partition("\n")
        if self.opened is None or self.opened.text != text:
            self.close()
            self.opened, self._fits = OpenSave(folder_of(self.path) / below, text), False
        manifest, shards, program = self.opened.manifest, self.opened.shards, self.program
        if not self._fits:
            self._check(manifest)
        tensors: dict[tuple[str, str], Tensor] = {}
        for which, held in state.tensors.items():
            stored = state.stored[which]
            staged = tensors[which] = torch.zeros_like(held, device="cpu")
            name = name_in(program, stored.name, manifest.aliases)
            assert name is not None
            read_into(Entry.of(stored, staged), manifest.aliases[name], manifest, shards, state)
        kept: State = {}
        if self._saved is not None:
            kept = staged_state(program, state, self.optimizer, self._saved, manifest, shards)
        with self._naming_manifest():
            extra = read_extra(manifest.extra)
        scale = manifest.loss_scale if program.scaled else None
        return _Staged(
            *(manifest.random, scale or LossScale(), extra, self._saved, state, tensors),
            *(self.optimizer, kept),
        )

    @property
    def _path(self) -> Path:
        assert self.opened is not None
        return self.opened.path

    def _check(self, manifest: Manifest) -> None:
        """Raise `RunError` unless a checkpoint fits the model and the optimizer."""
        check_model(self.program, manifest, self._path)
        check_dtypes(self.program, manifest, self._path)
        if self.optimizer is not None:
            with self._naming_manifest():
                self._saved = saved_optimizer(self.program, self.states, self.optimizer, manifest)
        self._fits = True

    @contextlib.contextmanager
    def _naming_manifest(self) -> Iterator[None]:
        """Add to an error that it is about the manifest."""
        try:
            yield
        except RunError as error:
            error.where = (f"in `{self._path / MANIFEST}`", *error.where)
            raise


def _spell(optimizer: Any) -> str:
    return "without an optimizer" if optimizer is None else f"with `{type(optimizer).__name__}`"

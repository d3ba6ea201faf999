"""Write a checkpoint: each rank writes a file with the parts that it owns, rank 0 the manifest.

What can fail on one rank is done between collectives, and raised on all. Checkpoints that are there
stay as they are until this one is whole, on the disk, and has its name.

A save in the background has no collectives but at its begin and its end: a thread of each process
writes copies, and that of rank 0 sees by the files of the others when they are done. So it is whole
as soon as it can be, whatever the ranks are doing by then.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from meshwright.compiler.public import Program
from meshwright.runtime.checkpoint.extra import written_extra
from meshwright.runtime.checkpoint.files import cannot
from meshwright.runtime.checkpoint.folder import NewSave, check_keep, new_folder_of, unfinished_path
from meshwright.runtime.checkpoint.header import Header, check_types
from meshwright.runtime.checkpoint.manifest import Manifest, SavedTensor
from meshwright.runtime.checkpoint.optimizer_state import (
    KeptTypes,
    check_optimizer,
    first_copies,
    joined,
    kept_types,
    optimizer_entries,
    unlike_first,
)
from meshwright.runtime.checkpoint.parts import Entry, own_parts, saved_tensors
from meshwright.runtime.checkpoint.shards import (
    Shard,
    check_origin,
    create_file,
    digest_path,
    read_header,
    shard_path,
    write_shard,
)
from meshwright.runtime.errors import MismatchError, RunError
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.state.weights import stored_tensors, transient_names
from meshwright.runtime.world.agreement import agree, agreed, all_told, first_says
from meshwright.runtime.world.termination import say

_ONE_FOLDER = "give every rank one folder, on a filesystem that all of them share"
_DIGEST = re.compile(r"([0-9a-f]{64})\n")
_PAUSE = 0.02
"""Seconds between looks at the files of the other ranks."""
_PATIENCE = 5.0
"""Seconds for which rank 0 waits for a file that does not grow when its own run has ended."""


class _Kept:
    """A context whose exception is kept, for `check` to raise it on another thread."""

    error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        self.error = error
        return True

    def check(self) -> None:
        """Raise what was kept, if anything was."""
        if self.error is not None:
            raise self.error


class _Part:
    """What one rank writes of a save. Its tensors are copies where nobody waits for the save."""

    def __init__(self, rank: int, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        self.rank, self.tensors, self.manifest = rank, tensors, manifest
        self.writing = _Kept()
        """What ended `write`, where that ran in the background."""

    def write(self, new: NewSave) -> None:
        """Write this rank's file and its digest; that of rank 0 has been open since the begin."""
        folder = unfinished_path(new.folder, self.manifest.save)
        shard = shard_path(folder, self.rank)
        header = Header.of(self.manifest.save, self.rank, self.tensors)
        try:
            if self.rank == 0:
                assert new.file is not None
                digest = write_shard(new.file, shard, header, self.tensors)
            else:
                with create_file(shard) as file:
                    digest = write_shard(file, shard, header, self.tensors)
            with create_file(digest_path(folder, self.rank)) as file:
                file.write(f"{digest}\n".encode())
        except FileNotFoundError:
            raise RunError(
                f"cannot write `{shard}`: the folder that rank 0 made is not there",
                help=_ONE_FOLDER,
            ) from None
        except OSError as error:
            raise cannot("write", shard, error, "name a folder to write into") from None

    def commit(self, new: NewSave, keep: int | None) -> None:
        """Make a checkpoint of what all ranks have written; on rank 0."""
        manifest = self.manifest
        shards = _whole_shards(new.path, manifest.save, manifest.mesh.num_ranks, manifest.tensors)
        new.commit(replace(manifest, shards=shards), keep)


class Saves:
    """The saves of a run, one after the other; `run` runs what each rank of this process does."""

    def __init__(
        self,
        program: Program,
        states: Sequence[RankState],
        run: Callable[[list[RankProgram]], list[Any]],
    ) -> None:
        self.program, self.states, self._run = program, states, run
        self._pending: _Saving | None = None
        """The save that is written in the background."""

    def save(self, path: Any, optimizer: Any, *, extra: Any, keep: Any, wait: Any) -> None:
        """Write a checkpoint, once the save before is one; see `Run.save`."""
        self.finish("save")
        saving = _Saving(self.program, self.states, path, optimizer, extra, keep, bool(wait))
        try:
            self._run(saving.begin())
            if wait:
                self._run(saving.finish("save"))
            else:
                saving.start()
                self._pending = saving
        except BaseException:
            saving.cancel()
            raise

    def finish(self, method: str) -> None:
        """Wait for the save in the background and raise its error; `method` is what ranks called.

        Does nothing in a process that was forked from the one that saves.
        """
        saving = self._pending
        if saving is None or not saving.is_here:
            return
        try:
            self._run(saving.finish(method))
        except Exception:
            # Not what interrupts the wait, which may be gone on with.
            self._pending = None
            saving.cancel()
            raise
        self._pending = None

    def leave(self) -> None:
        """Let this process end what it is writing, without the other ranks."""
        if self._pending is not None and self._pending.is_here:
            self._pending.leave()


class _Saving:
    """A save by the ranks of this process: `begin`, `start` unless the caller waits, `finish`."""

    def __init__(
        self,
        program: Program,
        states: Sequence[RankState],
        path: Any,
        optimizer: Any,
        extra: Any,
        keep: Any,
        wait: bool,
    ) -> None:
        self.program, self.states, self.path, self.optimizer = program, states, path, optimizer
        self._extra, self._keep, self._waits = extra, keep, wait
        self._options: dict[str, Any] | None = None
        self._asked: dict[str, str] = {}
        self._types: KeptTypes = {}
        self._new = NewSave(Path())
        self._parts: dict[int, _Part] = {}
        self._process = os.getpid()
        self._all_written = threading.Event()
        self._leaves, self._cancelled = threading.Event(), threading.Event()
        self._committing = _Kept()
        """What ended the commit, where that ran in the background."""
        self._thread: threading.Thread | None = None

    # -- with the other ranks -----------------------------------------------------------------

    def begin(self) -> list[RankProgram]:
        """Agree on what is saved and make its folder; unless the caller waits, copy all of it."""
        return [self._begin(state) for state in self.states]

    def _begin(self, state: RankState) -> RankProgram:
        yield from agreed(state, self._check, "save")
        own = json.dumps([state.progress, self._options, self._types, self._asked])
        said = [json.loads(text) for text in (yield from all_told(state, own, state.holders))]
        options = joined([each[1] for each in said], self.program)
        types = {name: kept for each in said for name, kept in each[2].items()}
        held = first_copies(self.states)
        problem = unlike_first(self._options, options, held)
        problem = problem or _not_abreast(state.progress, said[0][0])
        yield from agree(state, problem or _asked_otherwise(self._asked, said[0][3]))
        part = yield from agreed(state, lambda: self._part(state, options, types))
        save = yield from first_says(state, self._new.begin)
        part.manifest = replace(part.manifest, save=save)
        self._parts[state.rank] = part

    def finish(self, method: str) -> list[RankProgram]:
        """Make a checkpoint of it, or raise on every rank what is in the way.

        `method` is that of the run which every rank called.
        """
        return [self._finish(state, self._parts[state.rank], method) for state in self.states]

    def _finish(self, state: RankState, part: _Part, method: str) -> RankProgram:
        yield from agreed(state, lambda: self._written(part), method)
        yield from first_says(state, self._committed)

    # -- what has no collectives --------------------------------------------------------------

    def _check(self) -> None:
        """Raise `RunError` for arguments that cannot be, and see what the optimizer keeps here."""
        self._new.folder, self._keep = new_folder_of(self.path), check_keep(self._keep)
        written_extra(self._extra)
        self._asked = self._asked or _spelled(self._waits, self._keep, self._extra)
        if self.optimizer is not None and self._options is None:
            # On the virtual mesh there is one optimizer for all ranks.
            self._options = check_optimizer(self.program, self.states, self.optimizer)
            if len(self.states[0].holders) > 1:
                self._types = kept_types(self.states, self.optimizer)

    def _part(self, state: RankState, options: dict[str, Any] | None, types: KeptTypes) -> _Part:
        """What a rank is to write, as it is now; `options` and `types` are of the optimizer on all
        ranks. Raises `RunError` for what cannot be saved."""
        program, optimizer = self.program, self.optimizer
        state.follow_written()
        entries = [
            Entry.of(stored, state.held(kind, stored)) for kind, stored in stored_tensors(program)
        ]
        if optimizer is not None:
            entries += optimizer_entries(program, state, optimizer, types)
        tensors = own_parts(entries, state)
        check_types(tensors)
        if not self._waits:
            tensors = {name: part.to("cpu", copy=True) for name, part in tensors.items()}
        manifest = Manifest(
            save="",
            mesh=state.mesh,
            plan=program.plan.source.text or program.plan.format(),
            random={
                "seed": state.random.seed,
                "step": state.random.step,
                "num_updates": state.num_updates,
            },
            aliases=dict(program.captured.aliases),
            tensors=saved_tensors(entries, state.mesh),
            optimizer=options,
            shards=(),
            extra=written_extra(self._extra),
            loss_scale=replace(state.loss_scale) if program.scaled else None,
            transient=transient_names(program),
            apart=dict(program.captured.model_aliases) if program.shared else None,
        )
        return _Part(state.rank, tensors, manifest)

    def start(self) -> None:
        """Begin to write in the background."""
        self._thread = threading.Thread(target=self._work, name="meshwright save")
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether this process writes, and not the one that it was forked from."""
        return self._process == os.getpid()

    def cancel(self) -> None:
        """End it, whole or not; what this process is writing is written first."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join()
        self._new.close()

    def leave(self) -> None:
        """End it without the other ranks, of which rank 0 needs only the files."""
        if self._thread is not None:
            self._leaves.set()
            self._thread.join()
            self._say_error()

    def _written(self, part: _Part) -> None:
        if self._waits:
            part.write(self._new)
        else:
            self._all_written.wait()
        part.writing.check()

    def _committed(self) -> str:
        if self._thread is None:
            self._parts[0].commit(self._new, self._keep)
        else:
            self._thread.join()
        self._committing.check()
        return ""

    def _work(self) -> None:
        """Write the parts of all ranks of this process, and commit them if rank 0 is one."""
        for part in self._parts.values():
            with part.writing:
                part.write(self._new)
        self._all_written.set()
        if 0 in self._parts and self._error is None:
            with self._committing:
                self._await_files()
                self._parts[0].commit(self._new, self._keep)
        self._new.close()
        if not threading.main_thread().is_alive():
            self._say_error()

    def _await_files(self) -> None:
        """Wait until every rank has written its file; once the run has ended, for those that grow.

        Raises `RunError` where that has an end.
        """
        path, main = self._new.path, threading.main_thread()
        for rank in range(self._parts[0].manifest.mesh.num_ranks):
            size, grew = -1, time.monotonic()
            # Where the folder has gone, the commit says so.
            while not _written_digest(path, rank) and path.exists():
                found, now = _size_of(shard_path(path, rank)), time.monotonic()
                # The interpreter waits for this thread before it exits.
                if found != size or (main.is_alive() and not self._leaves.is_set()):
                    size, grew = found, now
                if now - grew > _PATIENCE or self._cancelled.wait(_PAUSE):
                    raise RunError(f"the run ended before rank {rank} had written its file")

    @property
    def _error(self) -> BaseException | None:
        errors = [part.writing.error for part in self._parts.values()]
        return next(filter(None, errors), self._committing.error)

    def _say_error(self) -> None:
        """Tell of what no call raises any more."""
        if error := self._error:
            say(f"meshwright: the last save into `{self.path}` failed: {error}")


def _spelled(wait: bool, keep: int | None, extra: Mapping[Any, Any] | None) -> dict[str, str]:
    """The options that `save` was called with; of each value in `extra`, a digest."""
    digests = {
        f"extra[{key!r}]": hashlib.sha256(json.dumps(written_extra({"": value})).encode())
        for key, value in (extra or {}).items()
    }
    found = {option: digest.hexdigest() for option, digest in digests.items()}
    return {"wait": str(wait), "keep": str(keep), **found}


def _asked_otherwise(own: Mapping[str, str], first: Mapping[str, str]) -> RunError | None:
    """The error where this rank called `save` with other options than rank 0, whose counts; there
    may be no `extra` on others."""
    without = own.keys() <= {"wait", "keep"}
    for option in own if without else {**own, **first}:
        ours, theirs = own.get(option), first.get(option)
        if ours == theirs:
            continue
        said = f"`{option}={ours}`, and rank 0 with `{option}={theirs}`"
        if option.startswith("extra"):
            said = f"`{option}` unlike rank 0, whose value alone would be kept"
        return MismatchError(
            f"this rank called `save` with {said}",
            help="call `save` with the same arguments on every rank; `extra` may be None on others",
        )
    return None


def _not_abreast(own: Sequence[int], first: Sequence[int]) -> RunError | None:
    """The error where this rank has made more or fewer steps than rank 0: parts would not fit."""
    for ours, theirs, what in zip(own, first, ("steps", "steps of the optimizer"), strict=True):
        if ours != theirs:
            return MismatchError(
                f"this rank has made {ours} {what}, and rank 0 {theirs}",
                help="call `save` after the same step on every rank, not where a signal came",
            )
    return None


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
    file, digest = shard_path(path, rank), _written_digest(path, rank)
    if not digest or not os.path.exists(file):
        raise RunError(f"`{file}`, which rank {rank} wrote, is not there", help=_ONE_FOLDER)
    header, size, header_digest = read_header(file)
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
    os.unlink(digest_path(path, rank))
    return Shard(size, header_digest, digest)


def _size_of(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _written_digest(path: Path, rank: int) -> str:
    """The SHA-256 of a rank's file, which that rank wrote beside it when it was whole; or empty."""
    try:
        found = _DIGEST.fullmatch(digest_path(path, rank).read_text())
    except OSError:
        return ""
    return found[1] if found else ""

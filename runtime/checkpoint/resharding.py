"""Cut a checkpoint anew, for another plan or into so many files, without a run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from meshwright.compiler.layout.extents import Extent, Padding
from meshwright.compiler.layout.factors import cut, whole
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.public import Program
from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.checkpoint.files import MAKE_ROOM, cannot, pieces, regular_file
from meshwright.runtime.checkpoint.fitting import check_model, check_names, model_tensors
from meshwright.runtime.checkpoint.folder import NewSave, OpenSave
from meshwright.runtime.checkpoint.header import Header, dtype_of
from meshwright.runtime.checkpoint.manifest import Manifest, SavedTensor
from meshwright.runtime.checkpoint.optimizer_loading import check_whole
from meshwright.runtime.checkpoint.optimizer_state import tensor_name
from meshwright.runtime.checkpoint.parts import Entry, read_whole, saved_parts, saved_tensors, taken
from meshwright.runtime.checkpoint.shards import Shard, ShardWriter, create_file, shard_path
from meshwright.runtime.state.weights import name_in, stored_tensors

_AXIS = "parts"


_Stored = tuple[Layout, tuple[Padding, ...], Mapping[str, tuple[int, ...]]]
"""A layout, what storage adds, and by axis the coordinates whose ranks hold it."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A mesh, the text of its plan, and how each parameter and buffer is to be stored."""

    mesh: Mesh
    plan: str
    stored: Mapping[str, _Stored]


def reshard(source: Path, target: Path, wanted: Program | int) -> Path:
    """Write the checkpoint in `source` anew below the folder `target`, and return its folder.

    It is cut as a run of the program `wanted` would save it, or evenly into so many files. Each
    tensor is read and written once, and one is held at a time: in two copies at most. Raises
    `RunError` for what is damaged or does not fit; then nothing is written.
    """
    with apart_from_caller("cpu"), OpenSave.current(source) as opened:
        manifest = opened.manifest
        check_names(manifest, opened.path)
        made = (
            _evenly(manifest, wanted)
            if isinstance(wanted, int)
            else _for_program(wanted, manifest, opened.path)
        )
        new = NewSave(target)
        try:
            save = new.begin()
            tensors = _tensors(manifest, made)
            shards = written(opened, new, made.mesh, tensors)
            changed = replace(
                manifest, save=save, mesh=made.mesh, plan=made.plan, tensors=tensors, shards=shards
            )
            return new.commit(changed, None)
        finally:
            new.close()


def _for_program(program: Program, manifest: Manifest, path: Path) -> Cut:
    """The layouts in which the ranks of a program hold the tensors."""
    check_model(program, manifest, path)
    found = {}
    for _, stored in stored_tensors(program):
        alias = name_in(program, stored.name, manifest.aliases)
        assert alias is not None
        found[manifest.aliases[alias]] = stored.layout, stored.paddings, stored.held_at
    plan = program.plan.source.text or program.plan.format()
    return Cut(program.mesh.of_ranks, plan, found)


def _evenly(manifest: Manifest, num_parts: int) -> Cut:
    """Each tensor in as many parts as there are files, along its first dim that is large enough."""
    found: dict[str, _Stored] = {}
    for name in model_tensors(manifest):
        shape = manifest.tensors[name].shape
        paddings: tuple[Padding, ...] = ()
        dims = [whole(size) for size in shape]
        for dim, size in enumerate(shape):
            if size >= num_parts > 1:
                padded = math.ceil(size / num_parts) * num_parts
                dims[dim] = cut(padded, _AXIS)
                paddings = (Padding(dim, (Extent(1, size, padded, 1),)),) if padded > size else ()
                break
        found[name] = Layout(tuple(dims)), paddings, {}
    return Cut(Mesh(((_AXIS, num_parts),)), f"mesh {_AXIS}={num_parts}\n", found)


def _tensors(manifest: Manifest, made: Cut) -> dict[str, SavedTensor]:
    """The tensors as they are to be saved.

    What an optimizer keeps of a parameter is cut like that if it has its shape, and else whole.
    """
    kept = check_whole(manifest)
    parameters = {tensor_name(key, name): name for name, keys in kept.items() for key in keys}
    entries = []
    for name, saved in manifest.tensors.items():
        like = parameters.get(name, name)
        whole: _Stored = replicated(saved.shape), (), {}
        layout, paddings, held_at = made.stored.get(like, whole)
        if manifest.tensors.get(like, saved).shape != saved.shape:
            layout, paddings, _ = whole
        tensor = torch.empty(saved.shape, dtype=dtype_of(saved.dtype), device="meta")
        entries.append(Entry(name, saved.shape, layout, tensor, paddings, held_at))
    return saved_tensors(entries, made.mesh)


def written(
    opened: OpenSave,
    new: NewSave,
    mesh: Mesh,
    tensors: Mapping[str, SavedTensor],
    sources: Mapping[str, str] | None = None,
) -> tuple[Shard, ...]:
    """Write all files, a tensor at a time, and describe them; `sources` has the names of tensors in
    the save that is read, where they are others."""
    writers = _writers(new, mesh, tensors)
    for name, saved in tensors.items():
        source = name if sources is None else sources[name]
        tensor = read_whole(source, opened.manifest, opened.shards)
        for owner, given in saved_parts(saved, mesh):
            # Opened each time: there may be more files than a process may have open.
            path = writers[owner].path
            try:
                with path.open("r+b", buffering=0) as file:
                    writers[owner].write(file, name, taken(tensor, given))
            except OSError as error:
                raise cannot("write", path, error, MAKE_ROOM) from None
    return tuple(map(_finished, writers))


def _writers(new: NewSave, mesh: Mesh, tensors: Mapping[str, SavedTensor]) -> list[ShardWriter]:
    """The files, of which rank 0's is there, with what each is to have."""
    held: list[dict[str, torch.Tensor]] = [{} for _ in range(mesh.num_ranks)]
    for name, saved in tensors.items():
        for owner, given in saved_parts(saved, mesh):
            shape, dtype = tuple(map(len, given)), dtype_of(saved.dtype)
            held[owner][name] = torch.empty(shape, dtype=dtype, device="meta")
    found = []
    for rank, parts in enumerate(held):
        path = shard_path(new.path, rank)
        try:
            if rank:
                create_file(path).close()
        except OSError as error:
            raise cannot("write", path, error, MAKE_ROOM) from None
        found.append(ShardWriter(path, Header.of(new.name, rank, parts)))
    return found


def _finished(writer: ShardWriter) -> Shard:
    path = writer.path
    try:
        with path.open("r+b", buffering=0) as file:
            text = writer.finish(file)
        digest = hashlib.sha256()
        with regular_file(path) as file:
            size = path.stat().st_size
            for piece in pieces(file, size):
                digest.update(piece)
    except OSError as error:
        raise cannot("write", path, error, MAKE_ROOM) from None
    return Shard(size, hashlib.sha256(text).hexdigest(), digest.hexdigest())

"""The manifest of a checkpoint: JSON that says what each tensor is and how it was cut.

Its last line is a SHA-256 of all the text before it, so that a changed byte anywhere is found. It
has the digest of each shard, for tools, and of each shard's header, which has those of its tensors:
so a rank checks what it reads, and reads only what it needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from meshwright.compiler.codegen.linking import LossScale
from meshwright.compiler.errors import LayoutError
from meshwright.compiler.garbage import uncollected
from meshwright.compiler.layout.extents import Extent, Padding
from meshwright.compiler.layout.factors import Dim, Factor
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.checkpoint.files import (
    COPY_AGAIN,
    cannot,
    read_bytes,
    regular_file,
    size_of,
)
from meshwright.runtime.checkpoint.header import dtype_of, unique
from meshwright.runtime.checkpoint.shards import Shard
from meshwright.runtime.errors import RunError

MANIFEST = "manifest.json"
_T = TypeVar("_T")
_SAVE = re.compile(r"[0-9a-f]{32}")
_FORMAT, _VERSION = "meshwright checkpoint", 4
_START = re.compile(rf'{{\n  "format": "{_FORMAT}",\n  "version": (\d{{1,9}}),\n')
_HEAD = re.compile(r'  "save": "([0-9a-f]{32})",\n  "number": (\d{1,18}),\n')
_END = re.compile(rb'  "sha256": "([0-9a-f]{64})"\n}\n')
_END_BYTES = len('  "sha256": ""\n}\n') + 64
_START_BYTES = 256
_TENSORS = '\n  "tensors": {'
_OTHER_VERSION = "load it with the version of Meshwright that wrote it"
_MOST_BYTES, _MOST_AXES, _MOST_FACTORS = 256 << 20, 64, 1024
"""Far above what any mesh or model needs, and low enough for a file to be refused at once."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a checkpoint: its true shape, its layout with padding, who wrote each part."""

    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    owners: tuple[int, ...]
    """The rank that wrote each part, in the order of `parts.part_coords`."""
    paddings: tuple[Padding, ...]
    """What storage adds to the shape, which is in no file."""


@dataclass(frozen=True, slots=True)
class Head:
    """The first lines of a manifest: which save it is of, and its place among those beside it."""

    save: str
    """128 random bits in hex, which every file of the save has."""
    number: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `manifest.json` says. `optimizer` is as `optimizer_state` wrote it, or None."""

    save: str
    mesh: Mesh
    plan: str
    """The text of the plan that it was saved under."""
    random: dict[str, int]
    """The seed of random numbers, and the steps and updates so far, which count them."""
    aliases: dict[str, str]
    tensors: dict[str, SavedTensor]
    optimizer: dict[str, Any] | None
    shards: tuple[Shard, ...]
    """The file of each rank."""
    extra: Any = None
    """Values of the caller's own, as `extra.written_extra` wrote them."""
    loss_scale: LossScale | None = None
    """The scale of gradients in float16, where there is one."""
    transient: tuple[str, ...] = ()
    """The buffers that the model's `state_dict()` leaves out."""
    number: int = 0
    """One more than that of any save that was in the folder before."""
    apart: dict[str, str] | None = None
    """The aliases of the model itself, where layers share parameters by the plan."""

    def to_text(self) -> str:
        """The file's text, one tensor per line. Raises `RunError` for one that is too long."""
        tensors = {
            name: {
                "shape": saved.shape,
                "dtype": saved.dtype,
                "dims": [[[[f.size, *f.axes] for f in part] for part in dim]
                         for dim in saved.layout.dims],
                "ranks": saved.owners,
                "padding": saved.paddings,
            }
            for name, saved in self.tensors.items()
        }  # fmt: skip
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "save": self.save,
            "number": self.number,
            "mesh": self.mesh.axes,
            "plan": self.plan,
            "random": self.random,
            "loss_scale": self.loss_scale and asdict(self.loss_scale),
            "aliases": self.aliases,
            **({} if self.apart is None else {"apart": self.apart}),
            "transient": self.transient,
            "optimizer": self.optimizer,
            "extra": self.extra,
            "shards": [(each.size, each.header, each.digest) for each in self.shards],
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        rows = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in tensors.items()]
        text = "\n".join(["{", *lines, '  "tensors": {', ",\n".join(rows), "  },", ""])
        if len(text) > _MOST_BYTES - _END_BYTES:
            raise RunError(
                f"the manifest has {len(text)} bytes, and no more than {_MOST_BYTES} are read",
                help="save from a mesh of fewer ranks",
            )
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f'{text}  "sha256": "{digest}"\n}}\n'


def manifest_text(folder: Path) -> str:
    """The text of the manifest in `folder`, unchanged since it was written.

    Raises `RunError` where there is none, where it is damaged, or where it is not one of ours.
    """
    file = folder / MANIFEST
    try:
        with regular_file(file) as opened:
            size = size_of(opened)
            if size > _MOST_BYTES:
                _refuse(file, f"it has {size} bytes")
            data = read_bytes(opened, size)
    except OSError as error:
        raise RunError(
            f"there is no checkpoint in `{folder}`: {error.strerror}",
            help=f"name a folder that `save` wrote, with its `{MANIFEST}`",
        ) from None
    if problem := _damage(data):
        _refuse(file, problem, _help_for(data))
    # What `save` writes is ASCII; for anything else the JSON will not do.
    return data.decode(errors="replace")


def head_of(folder: Path) -> Head:
    """The first lines of the manifest in `folder`. Raises `RunError` as `manifest_text` does."""
    file = folder / MANIFEST
    try:
        with regular_file(file) as opened:
            data = read_bytes(opened, min(size_of(opened), _START_BYTES))
    except OSError as error:
        raise cannot("read", file, error, COPY_AGAIN) from None
    if problem := _version_problem(data):
        _refuse(file, problem, _help_for(data))
    text = data.decode(errors="replace")
    found = _HEAD.match(text, _START.match(text).end())  # type: ignore[union-attr]
    if found is None:
        _refuse(file, "its first lines are not those of a manifest")
    return Head(found[1], int(found[2]))


def shard_sizes(text: str) -> list[int]:
    """The bytes of each rank's file, from the text of a manifest that `manifest_text` has checked,
    without reading what it says of tensors."""
    return [
        size for size, *_ in json.loads(text.partition(_TENSORS)[0].rstrip(",") + "}")["shards"]
    ]


def parse_manifest(folder: Path, text: str) -> Manifest:
    """The manifest that `manifest_text` read. Raises `RunError` for one that makes no sense.

    What it says is checked before it is used: the file may come from anywhere.
    """
    try:
        return _checked(_read(text))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, LayoutError) as e:
        _refuse(folder / MANIFEST, _spelled(e))


def _read(text: str) -> Any:
    """The JSON: of millions of lists, collecting garbage would take four fifths of the time."""
    with uncollected():
        return json.loads(text, object_pairs_hook=unique)


def _spelled(error: Exception) -> str:
    """What is wrong with an entry, in one line."""
    if isinstance(error, KeyError):
        return f"`{error.args[0]}` is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).partition("\n")[0][:300]


def _version_problem(data: bytes) -> str:
    """Why a file is not a manifest of this format, by its first bytes; empty if it is."""
    version = _version_of(data)
    if version is None:
        return f'it does not begin with "format": "{_FORMAT}"'
    if version != _VERSION:
        return f"it has version {version} of the format, and this is version {_VERSION}"
    return ""


def _help_for(data: bytes) -> str:
    return COPY_AGAIN if _version_of(data) in (None, _VERSION) else _OTHER_VERSION


def _version_of(data: bytes) -> int | None:
    start = _START.match(data[:_START_BYTES].decode(errors="replace"))
    return int(start[1]) if start else None


def _damage(data: bytes) -> str:
    """Why a file is not a manifest as it was written; empty if it is."""
    if problem := _version_problem(data):
        return problem
    end = _END.fullmatch(data, max(0, len(data) - _END_BYTES))
    if end is None:
        return "its last line is missing"
    if hashlib.sha256(data[: end.start()]).hexdigest().encode() != end[1]:
        return "it was changed since it was written"
    return ""


def _refuse(file: Path, problem: str, help: str = COPY_AGAIN) -> NoReturn:
    raise RunError(f"`{file}` is not a manifest that can be read: {problem}", help=help)


def _checked(found: Mapping[str, Any]) -> Manifest:
    shards = tuple(
        Shard(_count(size), _text(header), _text(digest))
        for size, header, digest in found["shards"]
    )
    mesh = _mesh(found["mesh"], len(shards))
    tensors = {
        name: _named(name, partial(_tensor, row, mesh)) for name, row in found["tensors"].items()
    }
    optimizer = found["optimizer"]
    if optimizer is not None and not isinstance(optimizer, dict):
        raise TypeError("the optimizer's entry is not a dictionary")
    save, scale = _text(found["save"]), found["loss_scale"]
    if not _SAVE.fullmatch(save):
        raise ValueError("the save's name is not 32 digits")
    aliases, apart = _aliases(found["aliases"], tensors), found.get("apart")
    return Manifest(
        save,
        mesh,
        _text(found["plan"]),
        _random(found["random"]),
        aliases,
        tensors,
        optimizer,
        shards,
        found["extra"],
        scale if scale is None else _named("loss_scale", partial(_loss_scale, scale)),
        _known(found["transient"], tensors),
        _count(found["number"], 0),
        None if apart is None else _named("apart", partial(_apart, apart, aliases)),
    )


def _random(found: Mapping[str, Any]) -> dict[str, int]:
    least = {"seed": -(2**63), "step": 0, "num_updates": 0}
    return {name: _count(found[name], low) for name, low in least.items()}


def _loss_scale(found: Mapping[str, Any]) -> LossScale:
    """The loss scale: a power of two, so that taking it out of a gradient is exact."""
    value = found["value"]
    if type(value) is not float or not 1 <= value < math.inf or math.frexp(value)[0] != 0.5:
        raise ValueError(f"{value!r} is not a power of two")
    return LossScale(value, _count(found["num_clean"], 0), _count(found["num_skipped"], 0))


def _aliases(found: Mapping[str, Any], tensors: Mapping[str, SavedTensor]) -> dict[str, str]:
    """The names that tensors go by; a name under which one is stored must lead to that one."""
    aliases = {_text(alias): _text(name) for alias, name in found.items()}
    for name in tensors.keys() & aliases.keys():
        if aliases[name] != name:
            raise ValueError(f"`{name}` is a tensor, and its name leads to `{aliases[name]}`")
    return aliases


def _apart(found: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, str]:
    """The aliases of a model, of whose tensors some are one in the checkpoint, and none is two."""
    apart = {_text(alias): _text(name) for alias, name in found.items()}
    if apart.keys() != aliases.keys():
        raise ValueError("its names are not those of the aliases")
    for alias, name in apart.items():
        if apart.get(name) != name or aliases[name] != aliases[alias]:
            raise ValueError(f"`{alias}` cannot be `{name}`")
    return apart


def _known(names: Sequence[Any], tensors: Mapping[str, SavedTensor]) -> tuple[str, ...]:
    """Names of tensors that are there."""
    for name in names:
        if _text(name) not in tensors:
            raise ValueError(f"`{name}` is not a tensor")
    return tuple(names)


def _mesh(rows: Sequence[Any], num_ranks: int) -> Mesh:
    """The mesh, with as many ranks as there are shards."""
    if len(rows) > _MOST_AXES:
        raise ValueError(f"a mesh of {len(rows)} axes")
    mesh = Mesh(tuple((_text(name), _count(size)) for name, size in rows))
    if len(set(mesh.names)) != len(mesh.names):
        raise ValueError(f"an axis comes twice in the mesh `{mesh}`")
    if mesh.num_ranks != num_ranks:
        raise ValueError(f"{num_ranks} shards for the mesh `{mesh}`")
    return mesh


def _named(name: str, read: Callable[[], _T]) -> _T:
    """What `read` makes of an entry; an error of it has the entry's name."""
    try:
        return read()
    except (LookupError, TypeError, ValueError, AttributeError, LayoutError) as error:
        raise ValueError(f"`{name}`: {_spelled(error)}") from None


def _tensor(row: Mapping[str, Any], mesh: Mesh) -> SavedTensor:
    if len(row["dims"]) > _MOST_FACTORS:
        raise ValueError(f"a tensor of {len(row['dims'])} dims")
    layout = Layout(tuple(_dim(dim) for dim in row["dims"]))
    layout.canonical(mesh)
    shape = tuple(_count(size, 0) for size in row["shape"])
    paddings = tuple(_padding(each) for each in row["padding"])
    if _padded(shape, paddings, mesh) != layout.shape:
        raise ValueError(f"shape {shape} does not fit layout {layout}")
    owners = tuple(_count(rank, 0) for rank in row["ranks"])
    if len(owners) != mesh.size(layout.split_axes) or max(owners) >= mesh.num_ranks:
        raise ValueError(f"{len(owners)} parts do not fit layout {layout}")
    axes = tuple(axis for axis in mesh.names if axis in layout.split_axes)
    for part, rank in enumerate(owners):
        # A part of the right size in another place would load without a word.
        if mesh.position(mesh.coords(rank), axes) != part:
            raise ValueError(f"rank {rank} does not hold part {part} of layout {layout}")
    dtype_of(dtype := _text(row["dtype"]))
    return SavedTensor(shape, dtype, layout, owners, paddings)


def _padding(found: Sequence[Any]) -> Padding:
    dim, extents = found
    return Padding(_count(dim, 0), tuple(Extent(*map(_count, each)) for each in extents))


def _padded(shape: tuple[int, ...], paddings: Sequence[Padding], mesh: Mesh) -> tuple[int, ...]:
    """The shape with what storage adds: less than an entry per block and rank that shares it."""
    for padding in paddings:
        for extent in padding.extents:
            if not 0 <= extent.padded - extent.size < mesh.num_ranks:
                raise ValueError(f"{extent.size} entries padded to {extent.padded}")
        if sum(extent.true for extent in padding.extents) != shape[padding.dim]:
            raise ValueError(f"the padding does not fit dim {padding.dim} of {shape}")
        stored = sum(extent.stored for extent in padding.extents)
        shape = (*shape[: padding.dim], stored, *shape[padding.dim + 1 :])
    return shape


def _dim(dim: Sequence[Any]) -> Dim:
    if not dim:
        raise ValueError("a dim without segments")
    if len(dim) + sum(len(factor) for segment in dim for factor in segment) > _MOST_FACTORS:
        raise ValueError("a dim with more factors than any layout has")
    return tuple(
        tuple(Factor(_count(size, 0), tuple(_text(a) for a in axes)) for size, *axes in segment)
        for segment in dim
    )


def _count(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value

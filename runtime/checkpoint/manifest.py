"""The manifest of a checkpoint: JSON that says what each tensor is and how it was cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from meshwright.compiler.factors import Dim, Factor, dim_axes
from meshwright.compiler.layout import Layout, LayoutError
from meshwright.compiler.mesh import Mesh
from meshwright.runtime.errors import RunError

if TYPE_CHECKING:
    from meshwright.runtime.checkpoint.parts import Entry

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "meshwright checkpoint", 1


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a checkpoint: its true shape, its layout with padding, who wrote each part."""

    shape: tuple[int, ...]
    dtype: str
    layout: Layout
    owners: tuple[int, ...]
    """The rank that wrote each part, in the order of `parts.part_coords`."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `manifest.json` says. `optimizer` is as `optimizer_state` wrote it, or None."""

    number: int
    mesh: Mesh
    random: dict[str, int]
    aliases: dict[str, str]
    tensors: dict[str, SavedTensor]
    optimizer: dict[str, Any] | None = None

    @staticmethod
    def of(
        number: int,
        mesh: Mesh,
        random: dict[str, int],
        aliases: dict[str, str],
        entries: Sequence[Entry],
        optimizer: dict[str, Any] | None,
    ) -> Manifest:
        """The manifest of what these ranks save."""
        tensors = {
            entry.name: SavedTensor(
                entry.shape,
                str(entry.tensor.dtype).removeprefix("torch."),
                entry.layout,
                entry.owners(place, mesh),
            )
            for place, entry in enumerate(entries)
        }
        return Manifest(number, mesh, random, aliases, tensors, optimizer)

    def to_json(self) -> str:
        """The text, one tensor a line."""
        tensors = {
            name: {
                "shape": saved.shape,
                "dtype": saved.dtype,
                "dims": [[[[f.size, *f.axes] for f in part] for part in dim]
                         for dim in saved.layout.dims],
                "ranks": saved.owners,
            }
            for name, saved in self.tensors.items()
        }  # fmt: skip
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "number": self.number,
            "mesh": self.mesh.axes,
            "random": self.random,
            "aliases": self.aliases,
            "optimizer": self.optimizer,
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        rows = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in tensors.items()]
        return "\n".join(["{", *lines, '  "tensors": {', ",\n".join(rows), "  }", "}", ""])


def shard_name(number: int, rank: int) -> str:
    """The file that a rank writes in the save with this number."""
    return f"{number:06}-{rank:05}.safetensors"


def read_manifest(path: Path) -> Manifest:
    """The manifest in the folder `path`. Raises `RunError` where there is none, or not one of ours.

    What it says is checked before it is used: the file may come from anywhere.
    """
    return parse_manifest(path, manifest_text(path))


def manifest_text(path: Path) -> str:
    """The text of the manifest in the folder `path`. Raises `RunError` where there is none."""
    file = path / MANIFEST
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"there is no checkpoint in `{path}`: {error.strerror}",
            help=f"name a folder that `save` wrote, with its `{MANIFEST}`",
        ) from None
    except ValueError:
        _refuse(file, "it is not JSON")


def parse_manifest(path: Path, text: str) -> Manifest:
    """The manifest that `text`, from the folder `path`, is. Raises `RunError` for any other."""
    file = path / MANIFEST
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        _refuse(file, "it is not JSON")
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        _refuse(file, f'its "format" is not "{_FORMAT}"')
    if found.get("version") != _VERSION:
        _refuse(file, f'its "version" is {found.get("version")!r}, not {_VERSION}')
    try:
        return _checked(found)
    except (KeyError, TypeError, ValueError, AttributeError, LayoutError) as error:
        _refuse(file, f"{type(error).__name__}: {error}".partition("\n")[0])


def _refuse(file: Path, problem: str) -> NoReturn:
    raise RunError(
        f"`{file}` is not a manifest that can be read: {problem}",
        help="name a folder that `save` wrote, or remove this one's manifest",
    )


def _checked(found: Mapping[str, Any]) -> Manifest:
    mesh = Mesh(tuple((_text(name), _count(size)) for name, size in found["mesh"]))
    tensors = {_text(name): _tensor(row, mesh) for name, row in found["tensors"].items()}
    optimizer = found["optimizer"]
    if optimizer is not None and not isinstance(optimizer, dict):
        raise TypeError("the optimizer's entry is no dictionary")
    return Manifest(
        _count(found["number"]),
        mesh,
        {key: _count(found["random"][key], 0) for key in ("seed", "step")},
        {_text(alias): _text(name) for alias, name in found["aliases"].items()},
        tensors,
        optimizer,
    )


def _tensor(row: Mapping[str, Any], mesh: Mesh) -> SavedTensor:
    layout = Layout(tuple(_dim(dim) for dim in row["dims"]))
    layout.canonical(mesh)
    shape = tuple(_count(size, 0) for size in row["shape"])
    padding = [full - size for full, size in zip(layout.shape, shape, strict=True)]
    parts = [mesh.size(dim_axes(dim)) for dim in layout.dims]
    if any(not 0 <= more < most for more, most in zip(padding, parts, strict=True)):
        raise ValueError(f"shape {shape} does not fit layout {layout}")
    owners = tuple(_count(rank, 0) for rank in row["ranks"])
    if len(owners) != mesh.size(layout.split_axes) or max(owners) >= mesh.num_ranks:
        raise ValueError(f"{len(owners)} parts do not fit layout {layout}")
    return SavedTensor(shape, _text(row["dtype"]), layout, owners)


def _dim(dim: Sequence[Any]) -> Dim:
    if not dim:
        raise ValueError("a dim without segments")
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
        raise TypeError(f"{value!r} is not a text")
    return value

"""Collectives over lists of all ranks' tensors, written from their definitions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meshwright.compiler.layout.collectives import Transfer
from meshwright.compiler.layout.local_ops import apply_all, shape_after
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Wire
from tests.compiler.layouts import combine


def run_wire(wire: Wire, tensors: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    """What each rank receives, given what each rank gives."""
    received = list(tensors)
    for members in mesh.groups(wire.axes):
        given = [tensors[rank] for rank in members]
        for place, rank in enumerate(members):
            received[rank] = _receive(wire, given, place)
    return received


def _receive(wire: Wire, given: list[Tensor], place: int) -> Tensor:
    match wire.kind:
        case "all_reduce":
            return combine(given, wire.reduce)
        case "all_gather":
            return torch.stack(given)
        case "reduce_scatter":
            assert all(len(x) == len(given) for x in given)
            return combine([x[place] for x in given], wire.reduce)
        case "all_to_all":
            assert all(len(x) == len(given) for x in given)
            return torch.stack([x[place] for x in given])
        case "permute":
            return given[(place - wire.shift) % len(given)]
        case "broadcast":
            return given[wire.root]
        case "reduce":
            total = combine(given, "sum")
            return total if place == wire.root else torch.zeros_like(total)
    raise AssertionError(wire)


def run_transfer(transfer: Transfer, tensors: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    """Every rank's tensor after a transfer."""
    places = [mesh.coords(rank) for rank in range(mesh.num_ranks)]
    pairs = list(zip(tensors, places, strict=True))
    moved = [apply_all(transfer.before, x, at, mesh) for x, at in pairs]
    assert tuple(moved[0].shape) == shape_after(transfer.before, tuple(tensors[0].shape))
    if transfer.wire is not None:
        moved = run_wire(transfer.wire, moved, mesh)
    return [apply_all(transfer.after, x, at, mesh) for x, at in zip(moved, places, strict=True)]

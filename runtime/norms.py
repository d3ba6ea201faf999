"""The norm of all gradients, each element counted once however many ranks hold it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from meshwright.compiler.layout.collectives import Wire
from meshwright.compiler.layout.cuts import parts_of
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.program import Program
from meshwright.runtime.rank import RankProgram, RankState


def gradients_of(state: RankState) -> list[Tensor]:
    """The gradients that this rank's parameters have."""
    return [p.grad for p in state.parameters.values() if p.grad is not None]


def total_norm(state: RankState, program: Program, p: float) -> RankProgram:
    """The `p`-norm over all gradients, a 0-d float64 tensor, by one all-reduce over the mesh."""
    mesh = program.mesh
    held = [
        part
        for name, parameter in state.parameters.items()
        if parameter.grad is not None
        for part in _parts(parameter.grad, program.parameters[name].layout, mesh)
    ]
    if not held:
        return torch.zeros((), dtype=torch.float64, device=state.device)
    norms = torch.stack([_norm(gradient, p) for gradient, _ in held])
    if math.isinf(p):
        most: Tensor = yield Wire("all_reduce", mesh.names, "max"), norms.amax()
        return most
    copies = [count for _, count in held]
    weights = torch.tensor(copies, dtype=torch.float64).to(state.device)
    total: Tensor = yield Wire("all_reduce", mesh.names), (norms**p / weights).sum()
    return total ** (1 / p)


def _parts(gradient: Tensor, layout: Layout, mesh: Mesh) -> Iterator[tuple[Tensor, int]]:
    """A rank's gradient, and how many ranks hold it; segment by segment where those differ."""
    dims = [parts_of(dim, mesh) for dim in layout.dims]
    if all(len({frozenset(c.axis for c in part.cuts) for part in dim}) == 1 for dim in dims):
        yield gradient, mesh.num_ranks // mesh.size(layout.split_axes)
        return
    starts = [itertools.accumulate((part.local_length for part in dim), initial=0) for dim in dims]
    places = (list(zip(start, dim, strict=False)) for start, dim in zip(starts, dims, strict=True))
    for grid in itertools.product(*places):
        own = gradient
        for dim, (start, part) in enumerate(grid):
            own = own.narrow(dim, start, part.local_length)
        ranks = math.prod(cut.size for _, part in grid for cut in part.cuts)
        yield own, mesh.num_ranks // ranks


def _norm(gradient: Tensor, p: float) -> Tensor:
    """Half types would overflow in a power."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient, p, dtype=wide)
    return norm.double()

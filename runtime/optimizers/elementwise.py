"""Try out whether an optimizer does with a rank's part of a tensor what it does with the whole."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.layout.factors import Factor
from meshwright.compiler.layout.layout import Layout, shard
from meshwright.compiler.layout.mesh import Mesh

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_MOST_ELEMENTS = 1 << 14
_SCALES = (1.0, 1e-6, 1.0, 1e6, 1.0, 0.0)
"""Of the gradients, by step: an optimizer that limits the norm of an update may act on large
ones only."""
_RATE = 0.1
"""The learning rate in trials: an optimizer's own may be zero until its schedule begins."""
_RELATIVE, _ROUNDING = 1e-6, 1e-13
"""How far equal updates may differ: state may be in float32, and parts round differently."""


def same_on_parts(make: Make, layout: Layout, mesh: Mesh) -> bool:
    """Whether ranks that hold a tensor in `layout` update it as one that holds it whole.

    Steps are made in float64, on a tensor of this layout or of a smaller one with the same splits.
    Every rank has an optimizer of its own, since some look at all of their tensors together.
    """
    small = _smaller(layout.drop_states(), mesh)
    places = list({_place(small, mesh, rank): mesh.coords(rank) for rank in _some(mesh)}.values())
    for value, gradients in _trials(small.shape):
        (whole,) = _values(make, [value], [gradients])
        for coords in places:
            held, *parts = (shard(each, small, mesh, coords) for each in (value, *gradients))
            (part,) = _values(make, [held], [parts])
            if not _same(part, [shard(each, small, mesh, coords) for each in whole]):
                return False
    return True


def same_with_copies(make: Make, copies: int) -> bool:
    """Whether tensors are updated alike when the optimizer has multiple copies of each."""
    for value, gradients in _trials((6, 8)):
        other, others = value.flip(0), [gradient.flip(1) for gradient in gradients]
        alone = _values(make, [value, other], [gradients, others])
        together = _values(make, [value, other] * copies, [gradients, others] * copies)
        if not all(map(_same, together, alone * copies)):
            return False
    return True


def _values(
    make: Make, values: Sequence[Tensor], gradients: Sequence[list[Tensor]]
) -> list[list[Tensor]]:
    """The values of each tensor before the first step and after every step."""
    parameters = [nn.Parameter(value.clone()) for value in values]
    optimizer = make(parameters)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = _RATE
    found = [[value] for value in values]
    for now in zip(*gradients, strict=True):
        for parameter, gradient in zip(parameters, now, strict=True):
            parameter.grad = gradient.clone()
        update(optimizer, lambda: torch.zeros(()))
        for parameter, own in zip(parameters, found, strict=True):
            own.append(parameter.detach().clone())
    return found


def update(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
    """Make one step; classes that need a closure get this one."""
    step: Callable[..., Any] = optimizer.step
    closures = [
        closure
        for parameter in list(inspect.signature(type(optimizer).step).parameters.values())[1:]
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    step(*closures)


def _trials(shape: tuple[int, ...]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Large values and small ones, each with a gradient for every step."""
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 1e-3):
        noise = torch.randn(1 + len(_SCALES), *shape, generator=generator, dtype=torch.float64)
        value, *gradients = noise.unbind()
        yield value * size, [g * scale for g, scale in zip(gradients, _SCALES, strict=True)]


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether every step changed both alike."""
    if not ours[0].numel():
        return True
    for before, after in zip(itertools.pairwise(ours), itertools.pairwise(theirs), strict=True):
        update, expected = before[1] - before[0], after[1] - after[0]
        size = max(float(each.nan_to_num(0.0, 0.0, 0.0).abs().max()) for each in after)
        rounding = _ROUNDING * size
        if not torch.allclose(update, expected, _RELATIVE, rounding, equal_nan=True):
            return False
    return True


def _some(mesh: Mesh) -> list[int]:
    """The ranks whose parts are tried: the first, the last, and some between."""
    step = max(mesh.num_ranks // 4, 1)
    return sorted({*range(0, mesh.num_ranks, step), mesh.num_ranks - 1})


def _place(layout: Layout, mesh: Mesh, rank: int) -> tuple[int, ...]:
    coords = mesh.coords(rank)
    return tuple(coords[axis] for axis in layout.split_axes)


def _smaller(layout: Layout, mesh: Mesh) -> Layout:
    """A layout with the same splits, of no more elements than can be tried."""
    limit = 256
    while math.prod(layout.shape) > _MOST_ELEMENTS and limit:
        layout = layout.with_dims(
            tuple(tuple(_shortened(factor, limit, mesh) for factor in segment) for segment in dim)
            for dim in layout.dims
        )
        limit //= 2
    return layout


def _shortened(factor: Factor, limit: int, mesh: Mesh) -> Factor:
    ranks = mesh.size(factor.axes)
    return Factor(ranks * min(factor.size // ranks, limit), factor.axes)

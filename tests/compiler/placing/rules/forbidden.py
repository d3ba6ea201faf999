"""Splits that a rule forbids although they would be right: found by trying them all."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.factors import cut
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.allowed import allowed
from meshwright.compiler.placing.rules.notation import Placement
from tests.compiler.placing.rules.brute import (
    Sample,
    call_of,
    canonical,
    check_held,
    distribute,
    is_special,
    run_locally,
)

aten: Any = torch.ops.aten

UNCHECKED = {
    aten.native_group_norm_backward.default,
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
    aten.native_batch_norm.default,
    aten.native_batch_norm_backward.default,
}
"""Kernels that read past the end of operands of the wrong size."""

LIMIT = 200
"""The most layouts of a call's operands that are tried."""


def right_but_forbidden(sample: Sample, mesh: Mesh) -> Iterator[Placement]:
    """Placements over one axis, in plain blocks, that hold on these tensors and have no rule."""
    if sample.op in UNCHECKED:
        return
    results = sample.run(sample.args, sample.kwargs)
    for layouts in _combinations([_blocks(t) for t in sample.tensors]):
        if not any(layout.split_axes for layout in layouts) or _allowed(
            sample, results, layouts, mesh
        ):
            continue
        for guess in _guesses(results):
            placement = Placement(layouts, guess)
            if not is_special(sample, placement) and _holds(sample, results, placement, mesh):
                yield placement
                break


def _combinations(options: list[list[Layout]]) -> Iterator[tuple[Layout, ...]]:
    """All, or a random choice where they are many."""
    if math.prod(map(len, options)) <= LIMIT:
        yield from itertools.product(*options)
    else:
        rng = random.Random(0)
        yield from {tuple(map(rng.choice, options)): None for _ in range(LIMIT)}


def _blocks(tensor: Tensor) -> list[Layout]:
    shape = tuple(tensor.shape)
    return [replicated(shape), *_splits(shape)]


def _splits(shape: tuple[int, ...]) -> Iterator[Layout]:
    base = replicated(shape)
    for i, size in enumerate(shape):
        if size and size % 2 == 0:
            yield base.with_dims((*base.dims[:i], cut(size, "a"), *base.dims[i + 1 :]))


def _allowed(
    sample: Sample, results: Sequence[Tensor | None], layouts: tuple[Layout, ...], mesh: Mesh
) -> bool:
    call = call_of(sample, results, layouts, mesh, differentiable=False)
    wanted = tuple(layout.canonical(mesh) for layout in layouts)
    return any(canonical(found, mesh).operands == wanted for found in allowed(call))


def _guesses(results: Sequence[Tensor | None]) -> Iterator[tuple[Layout | None, ...]]:
    """The same for every result: whole, split in one dim, or partial."""
    shapes = [None if t is None else tuple(t.shape) for t in results]
    wholes = [None if s is None else replicated(s) for s in shapes]
    yield tuple(wholes)
    if all(t is None or t.dtype != torch.bool for t in results):
        yield tuple(None if x is None else x.add_partial("a") for x in wholes)
    yield from zip(*([None] if s is None else _splits(s) for s in shapes), strict=False)


def _holds(
    sample: Sample, results: Sequence[Tensor | None], placement: Placement, mesh: Mesh
) -> bool:
    locals_of = [
        distribute(t, layout, mesh)
        for t, layout in zip(sample.tensors, placement.operands, strict=True)
    ]
    try:
        outputs = run_locally(sample, placement, locals_of, mesh)
        for i, expected in enumerate(results):
            layout = placement.results[i]
            if expected is not None and layout is not None:
                held = [output[i] for output in outputs]
                check_held(held, expected, layout, mesh, "")  # type: ignore[arg-type]
    except (AssertionError, IndexError, LayoutError, RuntimeError, TypeError, ValueError):
        return False
    return True


def shown(sample: Sample, placement: Placement) -> str:
    sides = [", ".join(map(str, side)) for side in (placement.operands, placement.results)]
    return f"{sample}: {' -> '.join(sides)}"

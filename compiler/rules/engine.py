"""Choose how to run one call: the placement that moves the fewest bytes, forward and backward.

Every letter of a rule may be split as one of the operands has it, or not at all. Each legal
combination is a candidate; its cost is what bringing the operands there moves. The `vary` rule is
applied here: where any operand is split, partial or varying on an axis, a differentiable operand
that is replicated on it must be varying.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout import Dim, Factor, Layout, dim_axes
from meshwright.compiler.layout import whole as unsplit
from meshwright.compiler.mesh import Mesh
from meshwright.compiler.reshard import cost as reshard_cost
from meshwright.compiler.rules.lookup import rule_for
from meshwright.compiler.rules.notation import (
    Call,
    Letters,
    Operand,
    Placement,
    Spec,
    letter_sizes,
)

EXPLICIT = 1e6
"""How many times dearer it is to use a value in another layout than the plan wrote for it."""

PREFERRED = 0.5
"""What a byte counts that brings a value to a layout which the plan asks for around it."""

REDUNDANT = 1e-3
"""What computing one element more counts against one byte moved: enough to break ties."""


@lru_cache(maxsize=65536)
def place(call: Call) -> Placement:
    """The cheapest way to run `call`. Raises `LayoutError` if no rule allows any."""
    best: tuple[float, Placement] | None = None
    for placement in candidates(call):
        price = placement_cost(call, placement)
        if best is None or price < best[0]:
            best = (price, placement)
    if best is None or math.isinf(best[0]):
        raise LayoutError(
            f"`{call.op}` cannot run on operands laid out as "
            + ", ".join(f"`{operand.layout}`" for operand in call.operands),
            help="give one of them another layout with `shard`",
        )
    return best[1]


def candidates(call: Call) -> Iterable[Placement]:
    """Every placement that the operator's rule allows for these operands."""
    found = rule_for(call.op)(call)
    return spec_placements(found, call) if isinstance(found, Spec) else found


def placement_cost(call: Call, placement: Placement) -> float:
    """Bytes that one rank sends to bring the operands there and back; ties go to less work."""
    total = 0.0
    for operand, layout in zip(call.operands, placement.operands, strict=True):
        total += operand_cost(operand, layout, call.mesh)
        total += REDUNDANT * math.prod(layout.local_shape(call.mesh))
    for result in placement.results:
        if result is not None:
            total += REDUNDANT * math.prod(result.local_shape(call.mesh))
    return total


def operand_cost(operand: Operand, layout: Layout, mesh: Mesh) -> float:
    """Bytes to bring one operand to `layout`, its adjoint included."""
    layout = layout.canonical(mesh)
    if layout == operand.layout or layout in operand.available:
        return 0.0
    try:
        price = reshard_cost(
            operand.layout, layout, operand.type.dtype.itemsize, mesh, operand.differentiable
        )
    except LayoutError:
        return math.inf
    if layout in operand.proposals:
        price *= PREFERRED
    overridden = operand.explicit and layout.dims != operand.layout.dims
    return price * EXPLICIT + EXPLICIT if overridden else price


def spec_placements(spec: Spec, call: Call) -> Iterator[Placement]:
    """The placements of a rule given as letters."""
    sizes = letter_sizes(spec.operands, call)
    options = {letter: _options(letter, size, spec, call) for letter, size in sizes.items()}
    _add_variants(options)
    for choice in itertools.product(*options.values()):
        dims = dict(zip(options, choice, strict=True))
        used = [axis for dim in choice for axis in dim_axes(dim)]
        if len(used) == len(set(used)):
            yield _placement(spec, call, dims, frozenset(used))


def _options(letter: str, size: int, spec: Spec, call: Call) -> list[Dim]:
    """The ways to split one letter: as an operand has it, or not."""
    found: dict[Dim, None] = {unsplit(size): None}
    if letter in spec.whole or not letter:
        return list(found)
    for letters, operand in zip(spec.operands, call.operands, strict=True):
        for layout in (operand.layout, *operand.proposals):
            for name, dim in zip(letters, layout.dims, strict=True):
                if name == letter and dim_axes(dim):
                    found[dim] = None
    return list(found)


def _add_variants(options: dict[str, list[Dim]]) -> None:
    """Where two letters want the same axis, also try each of them without it."""
    wanted: dict[str, set[str]] = {}
    for letter, dims in options.items():
        for dim in dims:
            for axis in dim_axes(dim):
                wanted.setdefault(axis, set()).add(letter)
    contested = {axis for axis, letters in wanted.items() if len(letters) > 1}
    for dims in options.values():
        for dim in tuple(dims):
            shared = contested & set(dim_axes(dim))
            for count in range(1, len(shared) + 1):
                for removed in itertools.combinations(sorted(shared), count):
                    variant = without_axes(dim, frozenset(removed))
                    if variant not in dims and dim_axes(variant):
                        dims.append(variant)


def _placement(spec: Spec, call: Call, dims: dict[str, Dim], used: frozenset[str]) -> Placement:
    kept = _kept_partials(spec, call, used)
    layouts = [
        Layout(
            tuple(
                dims[letter] if letter else unsplit(size)
                for letter, size in zip(letters, operand.type.shape, strict=True)
            ),
            partial=tuple(item for item in operand.layout.partial if (i, item[0]) in kept),
            varying=tuple(axis for axis in operand.layout.varying if axis not in used),
        )
        for i, (letters, operand) in enumerate(zip(spec.operands, call.operands, strict=True))
    ]
    required = vary_operands(layouts, call)
    results = tuple(
        None if letters is None else _result(letters, dims, required, spec)
        for letters in spec.results
    )
    return Placement(required, results)


def _kept_partials(spec: Spec, call: Call, used: frozenset[str]) -> set[tuple[int, str]]:
    """Which operands keep which pending sums: those of one linear group, and no other's."""
    pending: dict[str, list[int]] = {}
    for i, operand in enumerate(call.operands):
        for axis, reduce in operand.layout.partial:
            if axis not in used and reduce == "sum" and operand.keep_partial:
                pending.setdefault(axis, []).append(i)
    kept: set[tuple[int, str]] = set()
    for axis, holders in pending.items():
        for group in spec.linear:
            if group <= set(holders):
                kept.update((i, axis) for i in group)
                break
    return kept


def vary_operands(layouts: list[Layout], call: Call) -> tuple[Layout, ...]:
    """Apply the `vary` rule to the layouts chosen for the operands."""
    active: set[str] = set()
    for layout in layouts:
        active.update(layout.axes_used)
    return tuple(
        layout.add_varying(active - set(layout.axes_used))
        if operand.differentiable and active - set(layout.axes_used)
        else layout
        for layout, operand in zip(layouts, call.operands, strict=True)
    )


def _result(
    letters: Letters, dims: dict[str, Dim], operands: tuple[Layout, ...], spec: Spec
) -> Layout:
    out = tuple(dims[letter] if letter in dims else unsplit(1) for letter in letters)
    split = {axis for dim in out for axis in dim_axes(dim)}
    contracted = {
        axis
        for letter, dim in dims.items()
        if letter not in spec.inner
        for axis in dim_axes(dim)
    } - split
    partial = dict.fromkeys(contracted, spec.reduce)
    varying: set[str] = set()
    for layout in operands:
        partial.update(layout.partial)
        varying.update(layout.varying)
    return Layout(
        out,
        partial=tuple(sorted(partial.items())),
        varying=tuple(sorted(varying - split - set(partial))),
    )


def without_axes(dim: Dim, axes: frozenset[str]) -> Dim:
    """The dimension with `axes` no longer splitting it."""
    return tuple(
        tuple(
            Factor(factor.size, tuple(axis for axis in factor.axes if axis not in axes))
            for factor in segment
        )
        for segment in dim
    )

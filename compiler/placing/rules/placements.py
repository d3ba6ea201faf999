"""The placements that a rule given as letters allows.

Every letter may be split as one of the operands has it, or not at all. The `vary` rule is applied
here: where any operand is split, partial or varying on an axis, a differentiable operand that is
replicated on it must be varying.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.factors import Dim, Factor, dim_axes
from meshwright.compiler.layout.factors import whole as unsplit
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.notation import (
    Call,
    Dims,
    Letters,
    Operand,
    Placement,
    Spec,
    differentiable,
    letter_sizes,
)

SPLITTINGS = 64
"""The most ways to split one letter that are tried."""


def spec_placements(spec: Spec, call: Call) -> Iterator[Placement]:
    """The placements of a rule given as letters."""
    options = _all_options(spec, call)
    for choice in itertools.product(*options.values()):
        used = [axis for dim in choice for axis in dim_axes(dim)]
        if len(used) != len(set(used)):
            continue
        dims: Dims = dict(zip(options, choice, strict=True))
        if not all(is_consecutive(dims[letter], call.mesh) for letter in spec.consecutive):
            continue
        if spec.bind is not None:
            try:
                dims = {**dims, **spec.bind(dims)}
            except LayoutError:
                continue
        yield _placement(spec, call, dims, frozenset(used))


def _all_options(spec: Spec, call: Call) -> dict[str, list[Dim]]:
    sizes = letter_sizes(spec.operands, call)
    for letters, result in zip(spec.results, call.results, strict=False):
        for letter, size in zip(letters or (), result.shape if result else (), strict=True):
            if letter in spec.free:
                sizes.setdefault(letter, size)
    options = {
        letter: _options(letter, size, spec, call)
        for letter, size in sizes.items()
        if letter not in spec.derived
    }
    _add_variants(options, call.mesh, everywhere=spec.bind is not None)
    return options


def _options(letter: str, size: int, spec: Spec, call: Call) -> list[Dim]:
    """The ways to split one letter: as an operand has it, as is offered, or not."""
    found: dict[Dim, None] = {unsplit(size): None}
    if letter in spec.whole:
        return list(found)
    for letters, operand in zip(spec.operands, call.operands, strict=True):
        for layout in (operand.layout, *operand.proposals):
            _add_dims(letter, letters, layout, found)
    for result, layout in zip(spec.results, call.wanted, strict=False):
        _add_dims(letter, result or (), layout, found)
    found.update(dict.fromkeys(spec.offers.get(letter, ())))
    return list(found)


def _add_dims(letter: str, letters: Letters, layout: Layout, found: dict[Dim, None]) -> None:
    for name, dim in zip(letters, layout.dims, strict=True):
        if name == letter and dim_axes(dim) and is_even(dim):
            found[dim] = None


def is_even(dim: Dim) -> bool:
    """Whether every axis that cuts the dim cuts each of its segments.

    Otherwise ranks hold copies of the segment that is not cut, and a contraction counts them all.
    """
    axes = set(dim_axes(dim))
    return all({axis for factor in segment for axis in factor.axes} == axes for segment in dim)


def is_consecutive(dim: Dim, mesh: Mesh) -> bool:
    """Whether each rank holds entries that follow one another: nothing is cut inside of a part."""
    if len(dim) > 1:
        return not dim_axes(dim)
    (segment,) = dim
    parts = [factor.size // mesh.size(factor.axes) for factor in segment]
    return not any(factor.axes and math.prod(parts[:i]) > 1 for i, factor in enumerate(segment))


def _add_variants(options: dict[str, list[Dim]], mesh: Mesh, *, everywhere: bool) -> None:
    """Add splits without some of their axes, where two letters want the same axis or, with
    `everywhere`, a choice may be refused."""
    wanted: dict[str, set[str]] = {}
    for letter, dims in options.items():
        for dim in dims:
            for axis in dim_axes(dim):
                wanted.setdefault(axis, set()).add(letter)
    contested = {axis for axis, letters in wanted.items() if everywhere or len(letters) > 1}
    for dims in options.values():
        for dim in tuple(dims):
            shared = contested & set(dim_axes(dim))
            for count in range(1, len(shared) + 1):
                for removed in itertools.combinations(sorted(shared), count):
                    gone = frozenset(removed)
                    # As the others leave it, and cut anew into consecutive parts.
                    for variant in (left_by(dim, gone, mesh), without_axes(dim, gone)):
                        if variant not in dims and dim_axes(variant) and len(dims) < SPLITTINGS:
                            dims.append(variant)


def left_by(dim: Dim, axes: frozenset[str], mesh: Mesh) -> Dim:
    """The dimension with `axes` no longer splitting it, the others where they do now: nothing moves
    along those."""

    def apart(factor: Factor) -> Iterator[Factor]:
        if not axes & set(factor.axes):
            yield factor
            return
        *outer, last = ((axis,) if axis not in axes else () for axis in factor.axes)
        inner = factor.size
        for axis, kept in zip(factor.axes, outer, strict=False):
            yield Factor(mesh.size(axis), kept)
            inner //= mesh.size(axis)
        yield Factor(inner, last)

    return tuple(tuple(each for factor in segment for each in apart(factor)) for segment in dim)


def without_axes(dim: Dim, axes: frozenset[str]) -> Dim:
    """The dimension with `axes` no longer splitting it."""
    return tuple(
        tuple(
            Factor(factor.size, tuple(axis for axis in factor.axes if axis not in axes))
            for factor in segment
        )
        for segment in dim
    )


def _placement(spec: Spec, call: Call, dims: Dims, used: frozenset[str]) -> Placement:
    kept = _kept_partials(spec, call, used)
    layouts = [
        operand.layout
        if i in spec.ignored
        else _operand_layout(i, letters, operand, dims, kept, i in spec.shape_only)
        for i, (letters, operand) in enumerate(zip(spec.operands, call.operands, strict=True))
    ]
    required = vary_operands(layouts, call, spec, used)
    results = tuple(
        None
        if letters is None or type is None
        else _result(letters, type.shape, dims, required, spec)
        for letters, type in zip(spec.results, call.results, strict=True)
    )
    return Placement(required, results)


def _operand_layout(
    index: int,
    letters: Letters,
    operand: Operand,
    dims: Dims,
    kept: set[tuple[int, str]],
    shape_only: bool,
) -> Layout:
    own = tuple(
        dims[letter] if letter else unsplit(size)
        for letter, size in zip(letters, operand.type.shape, strict=True)
    )
    cutting = {axis for dim in own for axis in dim_axes(dim)}
    return Layout(
        own,
        tuple(
            item
            for item in operand.layout.partial
            if (shape_only or (index, item[0]) in kept) and item[0] not in cutting
        ),
        tuple(axis for axis in operand.layout.varying if axis not in cutting),
    )


def _kept_partials(spec: Spec, call: Call, used: frozenset[str]) -> set[tuple[int, str]]:
    """Which operands keep which pending sums: those of one linear group, and no other's."""
    pending: dict[str, set[int]] = {}
    for i, operand in enumerate(call.operands):
        for axis, reduce in operand.layout.partial:
            if axis not in used and reduce == "sum" and operand.keep_partial:
                pending.setdefault(axis, set()).add(i)
    zeros = {i for i, operand in enumerate(call.operands) if operand.any_sum}
    kept: set[tuple[int, str]] = set()
    for axis, holders in pending.items():
        group = next((g for g in spec.linear if g <= holders | zeros and g & holders), frozenset())
        kept.update((i, axis) for i in group & holders)
    return kept


def vary_operands(
    layouts: list[Layout],
    call: Call,
    spec: Spec,
    used: frozenset[str],
) -> tuple[Layout, ...]:
    """Apply the `vary` rule to the layouts chosen for the operands."""
    active = set(used)
    for i, layout in enumerate(layouts):
        if i not in spec.ignored:
            active.update(layout.split_axes if i in spec.shape_only else layout.axes_used)
    if not differentiable(call):
        return tuple(layouts)
    return tuple(
        layout.add_varying(active - set(layout.axes_used))
        if operand.differentiable
        and i not in spec.shape_only | spec.ignored
        and active - set(layout.axes_used)
        else layout
        for i, (layout, operand) in enumerate(zip(layouts, call.operands, strict=True))
    )


def _result(
    letters: Letters,
    shape: tuple[int, ...],
    dims: Mapping[str, Dim],
    operands: tuple[Layout, ...],
    spec: Spec,
) -> Layout:
    out = tuple(
        dims.get(letter, unsplit(size)) for letter, size in zip(letters, shape, strict=True)
    )
    split = {axis for dim in out for axis in dim_axes(dim)}
    contracted = {
        axis for letter, dim in dims.items() if letter not in spec.inner for axis in dim_axes(dim)
    } - split
    partial = dict.fromkeys(sorted(contracted), spec.reduce)
    varying: set[str] = set()
    for i, layout in enumerate(operands):
        if i not in spec.shape_only | spec.ignored:
            partial.update(layout.partial)
            varying.update(layout.varying)
    return Layout(
        out,
        partial=tuple(sorted(partial.items())),
        varying=tuple(sorted(varying - split - set(partial))),
    )

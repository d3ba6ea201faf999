"""The placements that a rule given as letters allows.

Every letter may be split as one of the operands has it, or not at all. The `vary` rule is applied
here: where any operand is split, partial or varying on an axis, a differentiable operand that is
replicated on it must be varying.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.layout.factors import Dim, Factor, dim_axes
from meshwright.compiler.layout.factors import whole as unsplit
from meshwright.compiler.layout.layout import Layout, replicated
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
    """The placements of a rule given as letters, where each operand can be had in any of its
    layouts."""
    options, states = _all_options(spec, call), tuple(_states(spec, call))
    merged = (
        operand if i in spec.ignored else _merged(operand)
        for i, operand in enumerate(call.operands)
    )
    call = replace(call, operands=tuple(merged))
    for dims in _splits(spec, call, options):
        used = {axis for letter in options for axis in dim_axes(dims[letter])}
        for kept, free in states:
            if any(axis in used for _, axis in kept):
                continue
            axes = free.union(used)
            with suppress(LayoutError):  # of operands that are had together by no way
                yield _placement(spec, call, dims, axes, kept, free)


def _splits(spec: Spec, call: Call, options: Mapping[str, Sequence[Dim]]) -> Iterator[Dims]:
    """The ways to split all letters on which the operator can run."""
    for choice in _choices(tuple(options.values())):
        dims: Dims = dict(zip(options, choice, strict=True))
        if spec.bind is not None:
            yield from _bound(spec, spec.bind, dims, call.mesh)
        elif _fits(spec, dims, call.mesh):
            yield dims


def _fits(spec: Spec, dims: Dims, mesh: Mesh) -> bool:
    """Whether ranks hold consecutive entries where they have to."""
    return all(is_consecutive(dims[letter], mesh) for letter in spec.consecutive)


def _bound(spec: Spec, bind: Callable[[Dims], Dims], dims: Dims, mesh: Mesh) -> Iterator[Dims]:
    """A choice with the letters that follow from it; where it is refused, without some of its axes,
    and no more of them than that takes."""
    axes = sorted({axis for dim in dims.values() for axis in dim_axes(dim)})
    enough: list[frozenset[str]] = []
    for gone in map(frozenset, _subsets(axes)):
        if any(each <= gone for each in enough):
            continue
        # As the others leave it, and cut anew into consecutive parts.
        variants = (
            {letter: left_by(dim, gone, mesh) for letter, dim in dims.items()},
            {letter: without_axes(dim, gone) for letter, dim in dims.items()},
        )
        for variant in variants:
            if _fits(spec, variant, mesh):
                with suppress(LayoutError):
                    yield {**variant, **bind(variant)}
                    enough.append(gone)


def _subsets(axes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All sets of axes, the smaller ones first."""
    counts = range(len(axes) + 1)
    return itertools.chain.from_iterable(itertools.combinations(axes, n) for n in counts)


def _choices(
    options: Sequence[Sequence[Dim]], used: frozenset[str] = frozenset()
) -> Iterator[tuple[Dim, ...]]:
    """An option for each letter, so that no two split over the same axis, or over one that is
    `used`."""
    if not options:
        yield ()
        return
    for dim in options[0]:
        axes = dim_axes(dim)
        if used.isdisjoint(axes):
            yield from ((dim, *rest) for rest in _choices(options[1:], used.union(axes)))


def _merged(operand: Operand) -> Operand:
    """An operand that is whole, pending and varying as any of its layouts is."""
    given = operand.layouts
    pending = dict.fromkeys(item for layout in given for item in layout.partial)
    axes = {axis for layout in given for axis in layout.varying} - {axis for axis, _ in pending}
    whole = replicated(operand.type.shape)
    layout = replace(whole, partial=tuple(sorted(pending)), varying=tuple(sorted(axes)))
    return replace(operand, layout=layout, others=given)


_Kept: TypeAlias = frozenset[tuple[int, str]]
"""Operands, by place, whose sums stay pending over an axis."""


def _states(spec: Spec, call: Call) -> Iterator[tuple[_Kept, frozenset[str]]]:
    """The ways in which sums may stay pending, over each axis those of one group of operands or of
    none, and the axes over which operands may vary without anything's being split."""
    pending: dict[str, set[int]] = {}
    for i, operand in enumerate(call.operands):
        for layout in operand.layouts:
            for axis, reduce in layout.partial:
                if reduce == "sum":
                    pending.setdefault(axis, set()).add(i)
    zeros = {i for i, operand in enumerate(call.operands) if operand.any_sum}
    # Of two that cost the same, the first is chosen: what is reduced late has time to come.
    groups = [
        [
            *(
                frozenset((i, axis) for i in group & holders)
                for group in spec.linear
                if group <= holders | zeros and group & holders
            ),
            frozenset[tuple[int, str]](),
        ]
        for axis, holders in pending.items()
    ]
    free = {
        axis
        for operand in call.operands
        for axis in operand.layout.varying
        if all(axis in layout.varying for layout in operand.others)
    }
    # What can be had without varying varies where that is needed, or in all that is made of it.
    some = {axis for operand in call.operands for own in operand.layouts for axis in own.varying}
    for choice in itertools.product(*groups):
        kept = frozenset[tuple[int, str]]().union(*choice)
        for more in _subsets(sorted(some - free)):
            yield kept, frozenset(free.union(more) - {axis for _, axis in kept})


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
    _add_variants(options, call.mesh)
    return options


def _options(letter: str, size: int, spec: Spec, call: Call) -> list[Dim]:
    """The ways to split one letter: as an operand has it, as is offered, or not."""
    found: dict[Dim, None] = {unsplit(size): None}
    if letter in spec.whole:
        return list(found)
    for letters, operand in zip(spec.operands, call.operands, strict=True):
        for layout in operand.layouts:
            _add_dims(letter, letters, layout, found)
    for layout in call.wanted:
        _add_dims(letter, spec.results[0] or (), layout, found)
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


def _add_variants(options: dict[str, list[Dim]], mesh: Mesh) -> None:
    """Add splits without some of their axes, where two letters want the same axis."""
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


def _placement(
    spec: Spec,
    call: Call,
    dims: Dims,
    used: frozenset[str],
    kept: Set[tuple[int, str]],
    varying: frozenset[str],
) -> Placement:
    layouts = [
        operand.layout
        if i in spec.ignored
        else _operand_layout(i, letters, operand, dims, kept, i in spec.shape_only, varying)
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
    kept: Set[tuple[int, str]],
    shape_only: bool,
    varying: frozenset[str],
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
        tuple(axis for axis in operand.layout.varying if axis in varying - cutting),
    )


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

"""Sizes of a layout's factors, from literals, `let` and the shape of the tensor.

    solve([(3 heads@tp hd), d], (2304, 768), {"tp": 2})
    -> dim 0: 3 · 12@tp · 64, dim 1: 768

where a `let` binds heads to 12. A name has one size within a statement and tensor. An unknown
that is alone in a product follows from the shape; factors that no split needs apart stay merged:
without `let`, dim 0 is 3 · 768@tp, which are the same blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, prod
from types import EllipsisType
from typing import TypeAlias

from meshwright.dsl.errors import PlanError, either, plural
from meshwright.dsl.layouts import DimTemplate, FactorTemplate, LayoutTemplate, SegmentTemplate
from meshwright.dsl.source import Span
from meshwright.dsl.statements import Fused

Factor: TypeAlias = tuple[int, tuple[str, ...]]
"""A size and the axes that split it, major first."""
Segment: TypeAlias = tuple[Factor, ...]
Dim: TypeAlias = tuple[Segment, ...]

_MOST_SHOWN = 8
_LARGEST_TRIED = 4096


def solve(
    template: LayoutTemplate, shape: Sequence[int], mesh: Mapping[str, int], tensor: str = ""
) -> tuple[Dim, ...]:
    """The factors of each dim of a tensor of this shape.

    `tensor` is how errors call it, such as `blocks.0.attn.qkv.weight: f32`.
    """
    solver = _Solver(tuple(shape), _expand(template, tuple(shape), tensor), mesh, tensor)
    _infer(solver)
    return tuple(
        _solve_dim(solver, dim, size) for dim, size in zip(solver.dims, solver.shape, strict=True)
    )


def solve_columns(
    fused: Fused,
    shape: Sequence[int],
    dim: int,
    mesh: Mapping[str, int],
    tensor: str = "",
    over: tuple[str, ...] = (),
) -> Dim:
    """The factors of a linear's output features: `dim` of a weight of this shape, split over those
    of the statement's axes that are given in `over`, or else all of them.

    The first named factor of every segment of `as` is split; without `as`, the whole dim.
    """
    whole = FactorTemplate(None, "output features", span=fused.at("over"))
    factors = fused.factors or DimTemplate(((whole,),), fused.at("over"))
    dims = [DimTemplate(((FactorTemplate(size),),)) for size in shape]
    dims[dim] = factors.split_first_named(over or fused.over)
    return solve(LayoutTemplate(tuple(dims), span=fused.span), shape, mesh, tensor)[dim]


@dataclass(slots=True)
class _Solver:
    """The sizes found so far for one tensor."""

    shape: tuple[int, ...]
    dims: list[DimTemplate]
    mesh: Mapping[str, int]
    tensor: str
    sizes: dict[str, int] = field(default_factory=dict)

    def known(self, factor: FactorTemplate) -> int | None:
        return self.sizes.get(factor.name) if factor.size is None else factor.size

    def monomial(self, segment: SegmentTemplate) -> tuple[int, tuple[str, ...]]:
        """The product of the known factors, and the unknown ones."""
        sizes = [self.known(factor) for factor in segment]
        unknown = sorted(
            factor.name for factor, size in zip(segment, sizes, strict=True) if size is None
        )
        return prod(size for size in sizes if size is not None), tuple(unknown)

    def error(self, code: str, message: str, *spans: Span | None, help: str) -> PlanError:
        return PlanError(code, message, spans=spans, subject=self.subject(), help=help)

    def subject(self) -> str:
        """The tensor with the sizes found so far: `w: f32[(3 12 64), 768] = [2304, 768]`."""
        if not self.tensor:
            return ""
        found = [self._show(dim, size) for dim, size in zip(self.dims, self.shape, strict=True)]
        aligned, shape = ", ".join(found), ", ".join(map(str, self.shape))
        own = "" if aligned == shape else f" = [{shape}]"
        return f"{self.tensor}[{aligned}]{own}"

    def _show(self, dim: DimTemplate, size: int) -> str:
        if len(dim.segments) == 1 and len(dim.segments[0]) == 1:
            return str(size)
        segments = (" ".join(str(self.known(f) or f.name) for f in seg) for seg in dim.segments)
        return f"({' | '.join(segments)})"


def _expand(template: LayoutTemplate, shape: tuple[int, ...], tensor: str) -> list[DimTemplate]:
    """The dims of the layout, one for each of the tensor's."""
    missing = len(shape) - sum(not isinstance(dim, EllipsisType) for dim in template.dims)
    if missing < 0 or (missing > 0 and ... not in template.dims):
        written = plural(len(template.dims), "dimension")
        raise PlanError(
            "P206",
            f"the layout has {written}, the tensor {len(shape)}",
            spans=[template.span],
            subject=f"{tensor}{list(shape)}" if tensor else "",
            help="write one entry for each dimension, or `...` for the leading ones",
        )
    dims: list[DimTemplate] = []
    for dim in template.dims:
        if isinstance(dim, EllipsisType):
            whole = shape[len(dims) : len(dims) + missing]
            dims += [DimTemplate(((FactorTemplate(size),),)) for size in whole]
        else:
            dims.append(dim)
    return dims


def _infer(solver: _Solver) -> None:
    """Find each name that is the only unknown of some dim, until none is left to find."""
    pending = [
        (dim, size) for dim, size in zip(solver.dims, solver.shape, strict=True) if dim.names
    ]
    while pending:
        left = []
        for dim, size in pending:
            unknown = list({f.name for f in dim.factors if solver.known(f) is None})
            if len(unknown) == 1:
                solver.sizes[unknown[0]] = _only_unknown(solver, dim, size)
            elif unknown:
                left.append((dim, size))
        if len(left) == len(pending):
            return
        pending = left


def _only_unknown(solver: _Solver, dim: DimTemplate, size: int) -> int:
    """The whole number that makes the dim's segments add up to `size`, by bisection."""
    terms = [solver.monomial(segment) for segment in dim.segments]
    low, high = 1, size
    while low < high:
        middle = (low + high) // 2
        if sum(known * middle ** len(unknown) for known, unknown in terms) < size:
            low = middle + 1
        else:
            high = middle
    if size < 1 or sum(known * low ** len(unknown) for known, unknown in terms) != size:
        raise _mismatch(solver, dim, size)
    return low


def _solve_dim(solver: _Solver, dim: DimTemplate, size: int) -> Dim:
    totals = _segment_sizes(solver, dim, size)
    return tuple(
        _solve_segment(solver, segment, total)
        for segment, total in zip(dim.segments, totals, strict=True)
    )


def _segment_sizes(solver: _Solver, dim: DimTemplate, size: int) -> list[int]:
    """The size of each segment; unknown ones only where all have the same unknown factors."""
    terms = [solver.monomial(segment) for segment in dim.segments]
    rest = size - sum(known for known, unknown in terms if not unknown)
    share = sum(known for known, unknown in terms if unknown)
    if len({unknown for _, unknown in terms if unknown}) > 1:
        raise _undetermined(solver, dim.span, [name for _, unknown in terms for name in unknown])
    if (rest != 0) if not share else (rest < share or rest % share):
        raise _mismatch(solver, dim, size)
    return [known * (rest // share) if unknown else known for known, unknown in terms]


def _solve_segment(solver: _Solver, segment: SegmentTemplate, total: int) -> Segment:
    """Its factors; unknown ones merge with the split factor that they follow."""
    runs = _runs(segment)
    unknown = [run for run in runs if solver.monomial(run)[1]]
    if len(unknown) > 1:
        names = [name for run in unknown for name in solver.monomial(run)[1]]
        raise _undetermined(solver, segment[0].span, names)
    known = prod(solver.monomial(run)[0] for run in runs if run not in unknown)
    factors: list[Factor] = []
    for run in runs:
        merged = [*_merge(solver, run, total // known)] if run in unknown else run
        factors += [_divide(solver, factor) for factor in merged]
    return tuple(factors)


def _runs(segment: SegmentTemplate) -> list[SegmentTemplate]:
    """The segment cut before each split factor."""
    starts = [i for i, factor in enumerate(segment) if factor.axes and i] + [len(segment)]
    return [segment[a:b] for a, b in zip([0, *starts], starts, strict=False)]


def _merge(solver: _Solver, run: SegmentTemplate, size: int) -> SegmentTemplate:
    """A run of `size` as one factor, or two if the size of its split one is known."""
    head = solver.known(run[0])
    if run[0].axes and head is not None:
        return run[0], FactorTemplate(size // head)
    return (replace(run[0], size=size),)


def _divide(solver: _Solver, factor: FactorTemplate) -> Factor:
    size = solver.known(factor)
    assert size is not None
    ranks = prod(solver.mesh[axis] for axis in factor.axes)
    if size % ranks:
        raise _cannot_split(solver, factor, size, ranks)
    return size, factor.axes


def _cannot_split(solver: _Solver, factor: FactorTemplate, size: int, ranks: int) -> PlanError:
    what = f"{size} {factor.name}" if factor.name else f"{size}"
    over = ", ".join(f"{axis}={solver.mesh[axis]}" for axis in factor.axes)
    few = factor.name and size < ranks
    help = _two_ways_out(solver, factor, size, ranks) if few else _usable(factor, size)
    return solver.error("P203", f"cannot split {what} over {over}", factor.span, help=help)


def _usable(factor: FactorTemplate, size: int) -> str:
    """The sizes that the axes could have instead."""
    usable = _divisors(size)
    return "leave it whole" if usable in ([], [size]) else _use(factor, usable)


def _divisors(size: int) -> list[int]:
    return [n for n in range(2, min(size, _LARGEST_TRIED) + 1) if size % n == 0]


def _use(factor: FactorTemplate, usable: list[int]) -> str:
    *most, last = map(str, usable[:_MOST_SHOWN])
    sizes = f"{', '.join(most)} or {last}" if most else last
    if len(factor.axes) == 1:
        return f"use {factor.axes[0]}={sizes}"
    return f"give {either(factor.axes, 'and')} sizes whose product is {sizes}"


def _two_ways_out(solver: _Solver, factor: FactorTemplate, size: int, ranks: int) -> str:
    """There are fewer parts than ranks: keep them whole, or split over fewer ranks."""
    fitting = [axis for axis in factor.axes if size % solver.mesh[axis] == 0]
    common = gcd(size, ranks)
    fused = _is_fused(solver, factor)
    # Linears cannot have some segments split and others whole.
    whole = "leave all of it out of this statement" if fused else f"leave `{factor.name}` whole"
    if len(factor.axes) > 1 and fitting:
        return f"{whole}, or split over `{fitting[0]}` alone"
    if size == 1:
        return f"{whole}: one cannot be split"
    if fused or common == 1:
        return f"{whole}, or {_use(factor, _divisors(size))}"
    axis = factor.axes[0]
    two = f"`{axis}={common}, {axis}2={ranks // common}`"
    return (
        f"{whole}, or make it two axes, {two}: split this over `{axis}` alone, "
        f"and what divides over `({axis}, {axis}2)`"
    )


def _is_fused(solver: _Solver, factor: FactorTemplate) -> bool:
    """Whether a factor belongs to one of multiple segments."""
    own = (dim for dim in solver.dims if any(f.span == factor.span for f in dim.factors))
    return any(len(dim.segments) > 1 for dim in own)


def _mismatch(solver: _Solver, dim: DimTemplate, size: int) -> PlanError:
    sizes = {f.name: solver.known(f) for f in dim.factors if f.name and solver.known(f)}
    given, names = ", ".join(f"{name}={known}" for name, known in sizes.items()), list(sizes)
    return solver.error(
        "P205",
        f"`{dim}` does not make {size}" + (f" with {given}" if given else ""),
        dim.span,
        help=f"change {either(names)} or the factors, so that they make {size}"
        if names
        else f"write factors that make {size}, or names",
    )


def _undetermined(solver: _Solver, span: Span | None, names: Sequence[str]) -> PlanError:
    unknown = list(dict.fromkeys(names))
    bindings = ", ".join(f"{name} = ..." for name in unknown[:-1])
    return solver.error(
        "P204",
        f"the sizes of {either(unknown, 'and')} are not determined",
        span,
        help=f"bind all but one of them: `let {bindings}`",
    )

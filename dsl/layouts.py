"""Layouts as they are written: dims of named factors, before any size is known.

    [b@dp, ..., (3 heads@tp hd)] partial(tp)

A dim is a concatenation of one or more segments, and a segment is a product of factors, major to
minor.
`solve.py` finds the sizes once a tensor's shape is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import TypeAlias

from meshwright.dsl.source import Span

REDUCTIONS = ("sum", "max", "min")


@dataclass(frozen=True, slots=True)
class FactorTemplate:
    """A factor of a dim, and the axes that split it, major first.

    It has a size (`3`), a name (`heads`), or both where a `let` binds the name. `spelling` is the
    name of a group of axes, if one was written in their place.
    """

    size: int | None
    name: str = ""
    axes: tuple[str, ...] = ()
    spelling: str = field(default="", compare=False, repr=False)
    span: Span | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        size = self.name or str(self.size)
        return f"{size}@{self.spelling or format_axes(self.axes)}" if self.axes else size


SegmentTemplate: TypeAlias = tuple[FactorTemplate, ...]


@dataclass(frozen=True, slots=True)
class DimTemplate:
    """One dimension: the segments it concatenates, usually one."""

    segments: tuple[SegmentTemplate, ...]
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def factors(self) -> Iterator[FactorTemplate]:
        return (factor for segment in self.segments for factor in segment)

    @property
    def names(self) -> list[str]:
        """The factor names in it, each once, in order."""
        return list(dict.fromkeys(factor.name for factor in self.factors if factor.name))

    def split_first_named(self, axes: tuple[str, ...]) -> DimTemplate:
        """The same dim with the first named factor of every segment split over `axes`."""
        return replace(self, segments=tuple(_split(segment, axes) for segment in self.segments))

    def __str__(self) -> str:
        segments = [" ".join(map(str, segment)) for segment in self.segments]
        text = " | ".join(segments)
        return text if len(segments) == 1 and len(self.segments[0]) == 1 else f"({text})"


@dataclass(frozen=True, slots=True)
class LayoutTemplate:
    """A layout as written. `...` among the dims stands for any number of unsplit ones.

    `partial` are (axis, reduction) pairs: the true value is the reduction over that axis.
    """

    dims: tuple[DimTemplate | EllipsisType, ...]
    partial: tuple[tuple[str, str], ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis it mentions, each once."""
        dims = (dim for dim in self.dims if not isinstance(dim, EllipsisType))
        split = (axis for dim in dims for factor in dim.factors for axis in factor.axes)
        return tuple(dict.fromkeys((*split, *(axis for axis, _ in self.partial))))

    def __str__(self) -> str:
        dims = ("..." if isinstance(dim, EllipsisType) else str(dim) for dim in self.dims)
        pending = (
            f" partial({axis})" if reduction == "sum" else f" partial({axis}, {reduction})"
            for axis, reduction in self.partial
        )
        return f"[{', '.join(dims)}]" + "".join(pending)


def format_axes(axes: tuple[str, ...]) -> str:
    """Axes as a plan writes them: `tp`, or `(row, col)`."""
    return axes[0] if len(axes) == 1 else f"({', '.join(axes)})"


def _split(segment: SegmentTemplate, axes: tuple[str, ...]) -> SegmentTemplate:
    at = next((i for i, factor in enumerate(segment) if factor.name), None)
    if at is None:
        return segment
    return (*segment[:at], replace(segment[at], axes=axes), *segment[at + 1 :])

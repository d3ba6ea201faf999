"""Parse trees of layouts to templates."""

from __future__ import annotations

from dataclasses import dataclass, field

from lark import Token, v_args
from lark.tree import Meta

from meshwright.dsl.errors import PlanError, did_you_mean, quoted
from meshwright.dsl.layouts import (
    REDUCTIONS,
    DimTemplate,
    FactorTemplate,
    LayoutTemplate,
    SegmentTemplate,
    format_axes,
)
from meshwright.dsl.names import Names, axis_twice
from meshwright.dsl.reading.expressions import ValueReader
from meshwright.dsl.source import Source, Span, token_span
from meshwright.dsl.values import LARGEST

_LONGEST_SIZE = len(str(LARGEST))


@dataclass(frozen=True, slots=True)
class AxisList:
    """One or more axes, with groups expanded."""

    axes: tuple[str, ...]
    text: str
    span: Span

    @property
    def spelling(self) -> str:
        """What was written, if it is not the axes themselves; else empty."""
        return "" if self.text == format_axes(self.axes) else self.text


@dataclass(frozen=True, slots=True)
class _Partial:
    pairs: tuple[tuple[str, str], ...]
    span: Span = field(compare=False)


@v_args(meta=True)
class LayoutReader(ValueReader):
    """Reads layouts, with the names in force."""

    def __init__(self, source: Source, names: Names) -> None:
        super().__init__(source)
        self.names = names

    def axis_list(self, meta: Meta, words: list[Token]) -> AxisList:
        axes = self.names.axes((str(word), token_span(self.source, word)) for word in words)
        return AxisList(axes, format_axes(tuple(map(str, words))), self._span(meta))

    def factor(self, meta: Meta, parts: list[Token | AxisList | None]) -> FactorTemplate:
        size, axes = parts
        assert isinstance(size, Token)
        span = token_span(self.source, size)
        name = str(size) if size.type == "WORD" else ""
        number = self._bound(name, span) if name else _literal(size, span)
        if axes is None:
            return FactorTemplate(number, name, span=span)
        assert isinstance(axes, AxisList)
        return FactorTemplate(number, name, axes.axes, axes.spelling, span)

    def _bound(self, name: str, span: Span) -> int | None:
        """The size that a `let` binds to a factor's name."""
        size = self.names.sizes.get(name)
        if size is None:
            return None
        if size.q != 1 or size < 1:
            raise PlanError(
                "P106",
                f"{quoted(name)} is {size}, which cannot be a size",
                spans=[span],
                help="bind it to a whole number, 1 or more",
            )
        return int(size)

    def segment(self, meta: Meta, factors: list[FactorTemplate]) -> SegmentTemplate:
        used: dict[str, FactorTemplate] = {}
        for factor in factors:
            for axis in factor.axes:
                if axis in used:
                    raise axis_twice(axis, [factor.span, used[axis].span])
                used[axis] = factor
        return tuple(factors)

    def composite(self, meta: Meta, segments: list[SegmentTemplate]) -> DimTemplate:
        return DimTemplate(tuple(segments), self._span(meta))

    def dim(
        self, meta: Meta, parts: list[Token | FactorTemplate | DimTemplate]
    ) -> DimTemplate | Token:
        (part,) = parts
        if isinstance(part, FactorTemplate):
            return DimTemplate(((part,),), self._span(meta))
        return part

    def partial(self, meta: Meta, parts: list[AxisList | Token | None]) -> _Partial:
        axes, word = parts
        assert isinstance(axes, AxisList)
        reduction = "sum" if word is None else str(word)
        if reduction not in REDUCTIONS:
            assert isinstance(word, Token)
            raise PlanError(
                "P111",
                f"{quoted(reduction)} is not a reduction",
                spans=[token_span(self.source, word)],
                help=did_you_mean(reduction, REDUCTIONS),
            )
        return _Partial(tuple((axis, reduction) for axis in axes.axes), self._span(meta))

    def layout(
        self, meta: Meta, parts: list[DimTemplate | Token | _Partial | None]
    ) -> LayoutTemplate:
        self._check_one_ellipsis([part for part in parts if isinstance(part, Token)])
        self._check_axes_once(parts)
        dims = tuple(
            ... if isinstance(part, Token) else part
            for part in parts
            if isinstance(part, (DimTemplate, Token))
        )
        pending = [pair for part in parts if isinstance(part, _Partial) for pair in part.pairs]
        return LayoutTemplate(dims, tuple(pending), self._span(meta))

    def _check_one_ellipsis(self, ellipses: list[Token]) -> None:
        if len(ellipses) > 1:
            raise PlanError(
                "P206",
                "a layout has two `...`",
                spans=[token_span(self.source, token) for token in ellipses[:2]],
                help="keep one; it stands for any number of dimensions",
            )

    def _check_axes_once(self, parts: list[DimTemplate | Token | _Partial | None]) -> None:
        """Refuse an axis in two dims, or in a dim and `partial`; segments of a dim may share it."""
        used: dict[str, Span | None] = {}
        for part in parts:
            here: dict[str, Span | None] = {}
            if isinstance(part, DimTemplate):
                here = {axis: f.span for f in part.factors for axis in f.axes}
            elif isinstance(part, _Partial):
                here = {axis: part.span for axis, _ in part.pairs}
            for axis in here.keys() & used.keys():
                raise axis_twice(axis, [here[axis], used[axis]])
            used.update(here)


def _literal(token: Token, span: Span) -> int:
    if token.type == "DIGIT_WORD":
        raise PlanError(
            "P107",
            f"{quoted(token)} is not a factor",
            spans=[span],
            help="put a space between two factors, or bind their product with `let`",
        )
    if not token.isdigit() or len(token) > _LONGEST_SIZE or int(token) < 1:
        raise PlanError(
            "P106",
            f"{quoted(token)} is not a size",
            spans=[span],
            help="write a whole number, 1 or more",
        )
    return int(token)

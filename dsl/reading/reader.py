"""Parse trees to statements.

A verb that has only targets, axes and options needs no code here: `_make` reads the fields of its
dataclass. The methods named after verbs are for those with other parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from lark import Token, v_args
from lark.tree import Meta

from meshwright.dsl import statements as s
from meshwright.dsl.errors import PlanError, did_you_mean, quoted
from meshwright.dsl.kinds import AxisName, Choice, Count, Kind
from meshwright.dsl.layouts import DimTemplate, LayoutTemplate
from meshwright.dsl.reading.expressions import Sizing
from meshwright.dsl.reading.layout_reader import AxisList, LayoutReader
from meshwright.dsl.selectors import Selector
from meshwright.dsl.source import Span, token_span, tree_span
from meshwright.dsl.values import Value, Word, evaluate

_S = TypeVar("_S", bound=s.Statement)
_F = TypeVar("_F", bound=s.Fused)
_Parts: TypeAlias = list[Any]  # in the order of the grammar's rule; None for what is left out
_Group: TypeAlias = tuple[Token, AxisList]

_OF = {arrow: of for of, arrow in s.ARROWS.items()}


@dataclass(frozen=True, slots=True)
class _Option:
    key: Token
    value: Value


@v_args(meta=True)
class Reader(LayoutReader):
    """Reads statements with the names in force."""

    def __default__(self, data: Token, children: _Parts, meta: Meta) -> s.Statement:
        return self._make(s.STATEMENTS[str(data)], meta, children)

    # Parts

    def targets(self, meta: Meta, tokens: list[Token]) -> tuple[Selector, ...]:
        return tuple(map(self._selector, tokens))

    def option(self, meta: Meta, parts: _Parts) -> _Option:
        key, value = parts
        return _Option(key, self._value(value))

    def group(self, meta: Meta, parts: _Parts) -> _Group:
        key, axes = parts
        return key, axes

    def window(self, meta: Meta, parts: list[Token]) -> str:
        return str(parts[0])

    # Verbs

    def mesh(self, meta: Meta, sizings: list[Sizing]) -> s.MeshStatement:
        axes = tuple((str(key), self.names.mesh[str(key)]) for key, _ in sizings)
        places = {str(key): token_span(self.source, key) for key, _ in sizings}
        return self._make(
            s.MeshStatement, meta, [], axes=axes, spelling=_spelt(sizings), places=places
        )

    def let(self, meta: Meta, sizings: list[Sizing]) -> s.Let:
        values = tuple((str(key), self.names.sizes[str(key)]) for key, _ in sizings)
        return self._make(s.Let, meta, [], values=values, spelling=_spelt(sizings))

    def axes(self, meta: Meta, groups: list[_Group]) -> s.Axes:
        named = tuple((str(key), axes.axes) for key, axes in groups)
        return self._make(s.Axes, meta, [], groups=named)

    def precision(self, meta: Meta, parts: _Parts) -> s.Precision:
        dtype = self._choose(parts[0], s.DTYPES)
        return self._make(s.Precision, meta, parts[1:], dtype=dtype)

    def accumulate(self, meta: Meta, parts: _Parts) -> s.Accumulate:
        return self._counted(s.Accumulate, meta, parts)

    def shard(self, meta: Meta, parts: _Parts) -> s.Shard:
        targets, arrow, layout, *options = parts
        assert isinstance(layout, LayoutTemplate)
        return self._make(
            s.Shard,
            meta,
            [targets, *options],
            layout=layout,
            of=_OF[arrow or ""],
            places={"layout": layout.span},
        )

    def columns(self, meta: Meta, parts: _Parts) -> s.Columns:
        return self._fused(s.Columns, meta, parts)

    def summa(self, meta: Meta, parts: _Parts) -> s.Summa:
        return self._fused(s.Summa, meta, parts)

    def _fused(self, kind: type[_F], meta: Meta, parts: _Parts) -> _F:
        factors = next((part for part in parts if isinstance(part, DimTemplate)), None)
        rest = [part for part in parts if not isinstance(part, DimTemplate)]
        places = {} if factors is None else {"as": factors.span}
        if factors is not None:
            _check_names_a_factor(factors)
        return self._make(kind, meta, rest, factors=factors, places=places)

    def zero(self, meta: Meta, parts: _Parts) -> s.Zero:
        level, *rest = parts
        span = token_span(self.source, level)
        if str(level) not in ("1", "2", "3"):
            help = "use 1 (optimizer state), 2 (gradients too) or 3 (parameters too)"
            raise PlanError("P111", f"there is no `zero {level}`", spans=[span], help=help)
        return self._make(s.Zero, meta, rest, level=int(level), places={"level": span})

    def stages(self, meta: Meta, parts: _Parts) -> s.Stages:
        if not any(isinstance(part, AxisList) for part in parts):
            axis = self._axis_of_stages(meta)
            parts = [part for part in parts if part is not None]
            parts.append(AxisList((axis,), axis, self._span(meta)))
        if isinstance(parts[0], tuple):
            return self._make(s.Stages, meta, parts)
        return self._counted(s.Stages, meta, parts)

    def _axis_of_stages(self, meta: Meta) -> str:
        if "pp" not in self.names.mesh:
            raise PlanError(
                "P112",
                "the stages have no axis",
                spans=[self._span(meta)],
                help="add `over` and the axis of the pipeline",
            )
        return "pp"

    def offload(self, meta: Meta, parts: _Parts) -> s.Offload:
        what = self._choose(parts[0], s.OFFLOADED)
        return self._make(s.Offload, meta, parts[1:], what=what)

    def expect(self, meta: Meta, parts: _Parts) -> s.Expect:
        metric, axes, comparison, bound, window, targets = parts
        number = evaluate(bound, self.names.sizes)
        return self._make(
            s.Expect,
            meta,
            [targets],
            metric=self._choose(metric, s.METRICS),
            axes=() if axes is None else axes.axes,
            comparison=str(comparison),
            bound=int(number) if number.q == 1 else float(number),
            window=window or "",
            spelling={"bound": bound.text} | ({} if axes is None else {"axes": axes.text}),
            places={"bound": bound.span} | ({} if axes is None else {"axes": axes.span}),
        )

    def allow(self, meta: Meta, parts: _Parts) -> s.Allow:
        return self._make(s.Allow, meta, parts[1:], what=self._choose(parts[0], s.ALLOWED))

    # Construction

    def _make(
        self,
        verb: type[_S],
        meta: Meta,
        parts: _Parts,
        *,
        spelling: Mapping[str, str] | None = None,
        places: Mapping[str, Span | None] | None = None,
        **fields: Any,
    ) -> _S:
        """The statement of these fields, and of the targets, axes and options among `parts`."""
        spelt = dict(spelling or {})
        spans = {name: span for name, span in (places or {}).items() if span is not None}
        for part in parts:
            if isinstance(part, tuple):
                fields["targets"] = part
            elif isinstance(part, AxisList):
                fields["over"], spans["over"] = part.axes, part.span
                spelt |= {"over": part.spelling} if part.spelling else {}
            elif isinstance(part, _Option):
                self._read_option(verb, part, fields, spelt, spans)
        span = tree_span(self.source, meta)
        return verb(span=span, parts=spans, spelling=spelt, **fields)

    def _read_option(
        self,
        verb: type[s.Statement],
        option: _Option,
        fields: dict[str, Any],
        spelt: dict[str, str],
        spans: dict[str, Span],
    ) -> None:
        key, key_span = str(option.key), token_span(self.source, option.key)
        named = {s.option_name(each): each for each in verb.options()}
        kinds: dict[str, Kind] = {name: each.metadata["kind"] for name, each in named.items()}
        if key not in kinds:
            raise _no_such_option(verb.verb, key, kinds, key_span)
        if key in spans:
            raise PlanError(
                "P302", f"`{key}` is given twice", spans=[key_span, spans[key]], help="keep one"
            )
        kind, value = kinds[key], option.value
        found = kind.read(value, self.names.sizes)
        if isinstance(kind, AxisName):
            (found,) = self.names.axes([(value.text, value.span)])
        fields[named[key].name], spans[key] = found, value.span
        if value.text != kind.write(found):
            spelt[key] = value.text

    def _counted(self, verb: type[_S], meta: Meta, parts: _Parts) -> _S:
        """A statement whose first part is a number."""
        value, *rest = parts
        count = _AT_LEAST_ONE.read(value, self.names.sizes)
        spelling = {} if value.text == str(count) else {"count": value.text}
        return self._make(
            verb, meta, rest, count=count, spelling=spelling, places={"count": value.span}
        )

    def _choose(self, token: Token, words: tuple[str, ...]) -> str:
        value = Word(str(token), token_span(self.source, token))
        return Choice(words).read(value, self.names.sizes)

    def _selector(self, token: Token) -> Selector:
        span = token_span(self.source, token)
        selector = Selector(str(token), span)
        selector.check()
        return selector


_AT_LEAST_ONE = Count()


def _spelt(sizings: list[Sizing]) -> dict[str, str]:
    return {str(key): value.text for key, value in sizings}


def _no_such_option(verb: str, key: str, kinds: Mapping[str, Kind], span: Span) -> PlanError:
    help = did_you_mean(key, kinds) if kinds else f"remove it: `{verb}` has no options"
    return PlanError("P110", f"`{verb}` has no option {quoted(key)}", spans=[span], help=help)


def _check_names_a_factor(factors: DimTemplate) -> None:
    for segment in factors.segments:
        if not any(factor.name for factor in segment):
            raise PlanError(
                "P207",
                "a segment names no factor, so none can be split",
                spans=[factors.span],
                help="name the factor to split: `(3 heads hd)`",
            )
        for factor in segment:
            if factor.axes:
                raise PlanError(
                    "P207",
                    "`as` names the factors; `over` splits the first of them",
                    spans=[factor.span],
                    help=f"write `{factor.name or factor.size}` without an axis",
                )

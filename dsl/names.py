"""The names of a plan: sizes (`let`), axes (`mesh`) and groups of axes (`axes`).

They are collected before any other statement is read, since statements may come in any order.
"""

from __future__ import annotations

import graphlib
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import sympy
from lark import Token, Tree

from meshwright.dsl.errors import PlanError, did_you_mean, nearest, quoted
from meshwright.dsl.kinds import Count
from meshwright.dsl.reading.expressions import Sizing, ValueReader
from meshwright.dsl.source import Source, Span, token_span, tree_span
from meshwright.dsl.values import Value, evaluate, symbolic, unbound_name

_AXIS_SIZE = Count()
_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class Names:
    """The names in force while statements are read."""

    sizes: Mapping[str, sympy.Rational] = field(default_factory=dict)
    mesh: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def axes(self, names: Iterable[tuple[str, Span]]) -> tuple[str, ...]:
        """The axes with these names, groups expanded; raises for an unknown or a repeated one."""
        found: dict[str, None] = {}
        for name, span in names:
            for axis in self._expand(name, span):
                if axis in found:
                    raise axis_twice(axis, [span])
                found[axis] = None
        return tuple(found)

    def _expand(self, name: str, span: Span) -> tuple[str, ...]:
        if name in self.groups:
            return self.groups[name]
        if name in self.mesh:
            return (name,)
        if not self.mesh:
            help = f"add a line such as `mesh {name}=2`"
            raise PlanError(
                "P201", f"no axis {quoted(name)}: there is no mesh", spans=[span], help=help
            )
        known = [*self.mesh, *self.groups]
        help = did_you_mean(name, known)
        if not nearest(name, known):
            help += f", or add `{name}` to the mesh"
        raise PlanError("P201", f"the mesh has no axis {quoted(name)}", spans=[span], help=help)


def axis_twice(axis: str, spans: Iterable[Span | None]) -> PlanError:
    """The error for an axis that is used twice in one layout."""
    return PlanError(
        "P202",
        f"the axis `{axis}` is used twice",
        spans=spans,
        help="use each axis once; split over another axis here, or leave it whole",
    )


def collect(trees: list[Tree[Token]], source: Source, outer: Names | None = None) -> Names:
    """The names that these statements bind, and those of `outer`, which win over a `let` here."""
    outer = outer or Names()
    reader = ValueReader(source)
    lets = _unique(_sizings(trees, "let", reader), source)
    own = {name: value for name, value in lets.items() if name not in outer.sizes}
    sizes = {**outer.sizes, **_solve_lets(own, outer.sizes)}
    mesh = dict(outer.mesh)
    _check_one_mesh(trees, source)
    for name, value in _unique(_sizings(trees, "mesh", reader), source).items():
        mesh[name] = _AXIS_SIZE.read(value, sizes)
    groups = dict(outer.groups)
    groups.update(_groups(trees, source, Names(sizes, mesh)))
    return Names(sizes, mesh, groups)


def _sizings(trees: list[Tree[Token]], verb: str, reader: ValueReader) -> Iterator[Sizing]:
    for tree in trees:
        if tree.data == verb:
            for child in tree.children:
                assert isinstance(child, Tree)
                sizing: Sizing = reader.read(child)
                yield sizing


def _unique(sizings: Iterable[Sizing], source: Source) -> dict[str, Value]:
    found: dict[str, tuple[Token, Value]] = {}
    for key, value in sizings:
        if key in found:
            raise _bound_twice(found[key][0], key, source)
        found[str(key)] = (key, value)
    return {name: value for name, (_, value) in found.items()}


def _bound_twice(first: Token, second: Token, source: Source) -> PlanError:
    spans = [token_span(source, first), token_span(source, second)]
    return PlanError(
        "P302",
        f"{quoted(second)} is bound twice",
        spans=spans,
        help="keep one, or rename the other",
    )


def _solve_lets(
    values: dict[str, Value], outer: Mapping[str, sympy.Rational]
) -> dict[str, sympy.Rational]:
    """The value of each name, from the names that define it."""
    needs = {name: {s.name for s in symbolic(v).free_symbols} for name, v in values.items()}
    for name, others in needs.items():
        for other in sorted(each for each in others if each not in values and each not in outer):
            raise unbound_name(other, values[name].span, dict.fromkeys(values, sympy.Integer(0)))
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        cycle = list(dict.fromkeys(name for name in error.args[1] if name in values))
        more = f" and {len(cycle) - _MOST_NAMED} more" if len(cycle) > _MOST_NAMED else ""
        raise PlanError(
            "P121",
            "these names are defined by each other: "
            + ", ".join(map(quoted, cycle[:_MOST_NAMED]))
            + more,
            spans=list(dict.fromkeys(values[name].span for name in cycle))[:2],
            help="give one of them a number",
        ) from None
    sizes: dict[str, sympy.Rational] = {}
    known = ChainMap(sizes, dict(outer))
    for name in order:
        if name in values:
            sizes[name] = evaluate(values[name], known)
    return sizes


def _check_one_mesh(trees: list[Tree[Token]], source: Source) -> None:
    meshes = [tree for tree in trees if tree.data == "mesh"]
    if len(meshes) > 1:
        raise PlanError(
            "P301",
            "there are two meshes",
            spans=[tree_span(source, tree.meta) for tree in meshes[:2]],
            help="name all axes in one `mesh` statement",
        )


def _groups(trees: list[Tree[Token]], source: Source, axes: Names) -> dict[str, tuple[str, ...]]:
    groups: dict[str, tuple[str, ...]] = {}
    keys: dict[str, Token] = {}
    for group in (group for tree in trees if tree.data == "axes" for group in tree.children):
        assert isinstance(group, Tree)
        key, names = group.children
        assert isinstance(key, Token)
        assert isinstance(names, Tree)
        if key in groups:
            raise _bound_twice(keys[key], key, source)
        if key in axes.mesh:
            raise PlanError(
                "P302",
                f"{quoted(key)} is already an axis of the mesh",
                spans=[token_span(source, key)],
                help="rename the group",
            )
        tokens = [name for name in names.children if isinstance(name, Token)]
        groups[str(key)] = axes.axes((str(name), token_span(source, name)) for name in tokens)
        keys[str(key)] = key
    return groups

"""What a program moves, computes and holds, as formulas in the sizes and axes of its plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import sympy

from meshwright.compiler.costs.volume import share_sent
from meshwright.compiler.graph.flops import flops
from meshwright.compiler.graph.ir import Graph, Node, Phase
from meshwright.compiler.graph.names import starred
from meshwright.compiler.graph.transfers import transfers_of
from meshwright.compiler.program import Compiled
from meshwright.compiler.report.cost.named import Mark, Named, terms_of, total
from meshwright.compiler.report.cost.naming import Names, Naming, symbol
from meshwright.compiler.report.cost.sizes import NamedSizes, axes_product
from meshwright.compiler.report.cost.steps import unrolled
from meshwright.compiler.report.cost.trace import Trace
from meshwright.compiler.report.ledger import Moved, collectives
from meshwright.compiler.report.memory.holding import Memory
from meshwright.compiler.report.memory.prediction import memories
from meshwright.compiler.schedules.actions import actions_of

Sent: TypeAlias = "dict[tuple[str, str, str], Named]"
"""Bytes by phase, axes and module."""
Computed: TypeAlias = "dict[tuple[str, str], Named]"
"""Operations by phase and module."""
_MOST_FACTORED = 60
"""The most terms of a sum that is factored: sympy takes long for more."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A sympy expression `expr` in the names of sizes and axes, and `number`, what was counted for
    the sizes that were compiled."""

    expr: sympy.Expr
    number: int

    def at(self, values: Mapping[str, int]) -> int:
        """The number for other `values` of the names, such as `{"b": 16, "dp": 4}`, rounded
        down."""
        return int(sympy.floor(self.expr.subs({symbol(k): v for k, v in values.items()})))

    def __str__(self) -> str:
        return str(self.expr)


class Formulas:
    """Counts what a program moves, computes and holds, with formulas."""

    def __init__(self, program: Compiled, names: Naming | None, convention: str) -> None:
        self.program, self.convention = program, convention
        trace = Trace(program)
        self.names = Names(program, trace, names)
        self.sizes = NamedSizes(program, trace, self.names)
        self.mesh = self.sizes.mesh
        graphs = program.graphs().values()
        self._steps = {node: axes for graph in graphs for node, axes in unrolled(graph).items()}
        self._blocks: dict[str, list[Mark]] = {}
        self._called = _block_names(self.sizes.blocks, self.names.values)
        self.names.values |= {self._called[name]: n for name, n in self.sizes.blocks.items()}
        self.ranks: dict[str, int] = {}
        """The first rank at each place along a pipeline."""
        for rank in range(program.mesh.num_ranks):
            self.ranks.setdefault(program.place(rank), rank)

    def sent(self) -> dict[str, Sent]:
        """Bytes that a rank sends in a step, by place."""
        found: dict[str, Sent] = {place: {} for place in self.ranks}
        for node, moved in collectives(self.program):
            own = found[moved.at]
            for path, size in self._sent(node, moved):
                key = moved.phase, ", ".join(moved.axes), starred(path)
                own[key] = total((own.get(key, 0), size * self._times(moved.times)))
        return found

    def _sent(self, node: Node, moved: Moved) -> Iterator[tuple[str, Named]]:
        """The bytes of a collective, by the module that each of its operands belongs to."""
        if moved.kind == "transfer":
            # Between stages, however many blocks these have.
            yield node.origin.module, self.sizes.value(node)
            return
        wires = (each.wire for each in transfers_of(node, self.mesh))
        for source, wire in zip(node.args, wires, strict=True):
            if wire is not None:
                ranks = Fraction(self.mesh.size(wire.axes))
                formula = share_sent(wire, axes_product(wire.axes, self.mesh).expr, self.convention)
                share = Fraction(share_sent(wire, ranks, self.convention))
                path = source.origin.module or node.origin.module
                size = self.sizes.value(source).at(self.sizes.mark(path))
                yield path, self._step(node, size.share(formula, share))

    def _step(self, node: Node, size: Named) -> Named:
        """What one step of an unrolled loop takes: its part of what all take."""
        axes = self._steps.get(node)
        if axes is None:
            return size
        ranks = axes_product(axes, self.mesh)
        return size.share(ranks.expr / int(ranks), Fraction(1))

    def _times(self, times: int) -> int:
        """How often a graph runs: once for each turn of the loop, or so often."""
        axes = [axis for axis in self.mesh.names if axis in self.mesh.sequential]
        turns = self.mesh.size(axes)
        return axes_product(axes, self.mesh) if times == turns > 1 else times

    def computed(self) -> dict[str, Computed]:
        """Floating-point operations of a rank in a step, by place."""
        return {place: self._computed(rank) for place, rank in self.ranks.items()}

    def _computed(self, rank: int) -> Computed:
        found: Computed = {}
        for phase, graph, times in self._runs(rank):
            half = "backward" if phase.backward and self.program.trains else "forward"
            for node in graph.nodes:
                if count := flops(node, self.mesh, self.sizes):
                    path = node.origin.module
                    size = self._step(node, total([count]).at(self.sizes.mark(path)))
                    size = size * self._times(times)
                    key = half, starred(path)
                    found[key] = total((found.get(key, 0), size))
        return found

    def _runs(self, rank: int) -> Iterator[tuple[Phase, Graph, int]]:
        """The graphs that a rank runs in a step, and how often."""
        actions = actions_of(self.program.entries[rank])
        runs = Counter((each.stage, each.kind) for each in actions)
        for (stage, phase), times in runs.items():
            yield phase, self.program.stages[stage].graphs[phase], times

    def held(self) -> dict[str, Memory]:
        """The memory of ranks by place; its numbers have formulas."""
        return memories(self.program, None, self.sizes)

    def formula(self, numbers: Sequence[int], place: str) -> Formula:
        """The formula of a sum, for the ranks at a place: each number is simplified by itself, and
        equal blocks are counted once, times their number."""
        parts = (self._simple(self._folded(number, place)) for number in numbers)
        return Formula(sympy.Add(*parts), sum(map(int, numbers)))

    def _folded(self, number: int, place: str) -> sympy.Expr:
        blocks: dict[tuple[str, sympy.Expr], dict[int, Fraction]] = {}
        found: list[sympy.Expr] = []
        for (mark, expr), each in terms_of(number).items():
            if mark is None:
                found.append(_rational(each) * expr)
            else:
                blocks.setdefault((mark[0], expr), {})[mark[1]] = each
        for (name, expr), by_index in blocks.items():
            # A block of another stage may have left something here.
            counts = [by_index.get(i, Fraction(0)) for i in self._present(place, name)]
            usual = _usual(counts) if counts else Fraction(0)
            rest = sum(by_index.values(), Fraction(0)) - usual * len(counts)
            count = _rational(usual) * self._count(name, len(counts)) + _rational(rest)
            found.append(count * expr)
        return sympy.Add(*found)

    def _present(self, place: str, name: str) -> list[int]:
        """The blocks of a list of which ranks at a place hold parameters."""
        if place not in self._blocks:
            coords = self.program.mesh.coords(self.ranks[place])
            held = (each for each in self.program.parameters.values() if each.held_by(coords))
            self._blocks[place] = sorted({m for each in held if (m := self.sizes.mark(each.name))})
        return [index for own, index in self._blocks[place] if own == name]

    def _count(self, name: str, count: int) -> sympy.Expr:
        """How many blocks a rank has: all, an equal share over a pipeline, or so many."""
        blocks, axes = self.sizes.blocks, self.program.pipeline
        ranks = self.mesh.size(axes)
        if count * ranks != blocks[name]:
            return sympy.Integer(count)
        return symbol(self._called[name]) / axes_product(axes, self.mesh).expr

    def _simple(self, expr: sympy.Expr) -> sympy.Expr:
        expr = sympy.expand(expr)
        few = len(sympy.Add.make_args(expr)) <= _MOST_FACTORED
        return sympy.factor(expr) if few else sympy.factor_terms(expr)


def _block_names(blocks: Mapping[str, int], taken: Mapping[str, int]) -> dict[str, str]:
    """The names of how many blocks lists have: `layers`, if there is one, else like the lists."""
    alone = len(blocks) == 1 and "layers" not in taken
    return {name: "layers" if alone else f"num_{name.replace('.', '_')}" for name in blocks}


def _usual(counts: Sequence[Fraction]) -> Fraction:
    """What most blocks have. Of numbers that as many have it is 0, if others are then those of the
    first or last block, or that of the block in the middle."""
    frequent = Counter(counts)
    most = max(frequent.values())
    likely = [count for count, times in frequent.items() if times == most]
    middle = counts[len(counts) // 2]
    return min(likely, key=lambda count: (count != 0, count != middle))


def _rational(number: Fraction) -> sympy.Rational:
    return sympy.Rational(number.numerator, number.denominator)

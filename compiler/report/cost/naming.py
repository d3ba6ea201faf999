"""Where the names of sizes come from: layouts that a caller gives and those of the plan, and the
example's batch `b` and sequence `s`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from types import EllipsisType
from typing import Any, TypeAlias

import sympy
from torch import nn

from meshwright.compiler.errors import CompilerError
from meshwright.compiler.graph.ir import InputKind
from meshwright.compiler.program import Compiled
from meshwright.compiler.report.cost.dims import Atom, Dim, expanded, new, size_of, unify
from meshwright.compiler.report.cost.trace import Shape, Trace
from meshwright.dsl.layouts import DimTemplate, FactorTemplate
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Columns, Data, Shard

Naming: TypeAlias = "Mapping[str, str | int]"
"""Layouts by input, parameter or module, and numbers by name."""


class Source(IntEnum):
    """Who gave a name, the strongest first."""

    CALLER = 0
    EXAMPLE = 1
    LET = 2
    PLAN = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A name and what it names: a dim, or a factor of one."""

    source: Source
    name: str
    dim: Dim


def symbol(name: str) -> sympy.Symbol:
    """The symbol of a size or of an axis."""
    return sympy.Symbol(name, positive=True, integer=True)


class Names:
    """The formula of every atom, and the number behind every name.

    Raises `CompilerError` for names that cannot be, and `PlanError` for layouts that do not fit.
    """

    def __init__(self, program: Compiled, trace: Trace, given: Naming | None) -> None:
        self.program, self.trace = program, trace
        self.mesh = program.stages[0].forward.mesh
        self.values: dict[str, int] = dict(self.mesh.axes)
        self.named: dict[Atom, sympy.Expr] = {}
        self._sizes: dict[str, int] = {}
        self._known: dict[Atom, sympy.Expr] = {}
        places = [*self._of_caller(given or {}), *self._of_example(), *self._of_plan()]
        first: dict[str, Dim] = {}
        for place in places:
            unify(first.setdefault(place.name, place.dim), place.dim)
        self._resolve(places)

    def _of_caller(self, given: Naming) -> list[Place]:
        if not given:
            return []
        bound = {**self.program.plan.lets, **{k: v for k, v in given.items() if _is_size(v)}}
        lets = ", ".join(f"{name} = {value}" for name, value in bound.items())
        lines = [f"mesh {', '.join(f'{name}={size}' for name, size in self.program.mesh.axes)}"]
        lines += [f"let {lets}"] if lets else []
        lines += [f"shard {name} {text}" for name, text in given.items() if not _is_size(text)]
        return self._of_shards(Plan.parse("\n".join(lines) + "\n", "names"), Source.CALLER)

    def _of_example(self) -> Iterator[Place]:
        """`b` of what is split by `data`, and `s` of the other dim of tokens."""
        for node in self.program.inputs():
            shape = self.trace.inputs.get((InputKind.ARGUMENT, node.args[1]), ())
            statement = self._data().get(node.args[1])
            tokens = len(shape) == 2 and not node.tensor.dtype.is_floating_point
            batch = statement.dim if statement else 0
            for i, dim in enumerate(shape):
                name = "b" if i == batch else "s"
                if (i == batch and (statement or tokens)) or (i == 1 - batch and tokens):
                    size = node.tensor.shape[i]
                    if size > 1 and self._sizes.setdefault(name, size) == size:
                        yield Place(Source.EXAMPLE, name, dim)

    def _data(self) -> dict[str, Data]:
        names = [str(node.args[1]) for node in self.program.inputs()]
        return self.program.plan.resolve(Data, names) if self.program.plan.of(Data) else {}

    def _of_plan(self) -> Iterator[Place]:
        plan, parameters = self.program.plan, self.program.parameters
        yield from self._of_shards(plan, Source.PLAN)
        modules = {name: each for name, each in self.program.model.named_modules() if name}
        columns = plan.resolve(Columns, list(modules)) if plan.of(Columns) else {}
        for name, statement in columns.items():
            linear = isinstance(modules[name], nn.Linear)
            if linear and statement.factors and f"{name}.weight" in parameters:
                (dim, *_) = self.trace.inputs[InputKind.PARAMETER, f"{name}.weight"]
                yield from self._in_dim(dim, statement.factors, Source.PLAN, name)

    def _of_shards(self, plan: Plan, source: Source) -> list[Place]:
        """What layouts of inputs and parameters, or of the modules of these, name."""
        tensors = {name: shape for (_, name), shape in self.trace.inputs.items()}
        modules = [n.removesuffix(".weight") for n in tensors if n.endswith(".weight")]
        names = list(dict.fromkeys([*modules, *tensors, *dict(self.program.model.named_modules())]))
        waiting: list[tuple[str, Dim, DimTemplate]] = []
        resolved = plan.resolve(Shard, names, of="tensor") if plan.of(Shard) else {}
        for name, statement in resolved.items():
            if name not in tensors and name not in modules:
                continue
            name = name if name in tensors else f"{name}.weight"
            shape, dims = tensors[name], statement.layout.dims
            plan.dims(statement.layout, [size_of(expanded(dim)) for dim in shape], name)
            waiting += [(name, dim, template) for dim, template in _pairs(shape, dims)]
        found: list[Place] = []
        while waiting:
            # First those whose sizes are known, which may be those of others.
            name, dim, template = min(waiting, key=lambda each: len(self._unknown(each[2])) > 1)
            waiting.remove((name, dim, template))
            found += self._in_dim(dim, template, source, name)
        return found

    def _unknown(self, template: DimTemplate) -> list[FactorTemplate]:
        """The factors of a dim whose sizes are not known."""
        return [each for each in template.factors if not (each.size or each.name in self._sizes)]

    def _in_dim(
        self, dim: Dim, template: DimTemplate, source: Source, tensor: str
    ) -> Iterator[Place]:
        """The names of the factors of a dim that is one product."""
        if len(template.segments) != 1:
            return
        (factors,) = template.segments
        if source is Source.PLAN and len(self._unknown(template)) > 1:
            return
        sizes = self._factor_sizes(size_of(expanded(dim)), factors, tensor)
        parts = [new(size) for size in sizes]
        unify(dim, tuple(atom for part in parts for atom in part))
        for factor, part, size in zip(factors, parts, sizes, strict=True):
            if not factor.name or size == 1:
                continue
            if factor.name in self.values:
                raise CompilerError(
                    f"`{factor.name}` is an axis of the mesh, and the name of a size of `{tensor}`",
                    help="give one of them another name",
                )
            known = self._sizes.setdefault(factor.name, size)
            padded = tensor in self.program.parameters and self.program.parameters[tensor].paddings
            if known != size and source is Source.CALLER and not padded:
                raise CompilerError(
                    f"`{factor.name}` is {known} elsewhere, and {size} in `{tensor}`",
                    help="give one of them another name",
                )
            if known == size:
                own = Source.LET if source is Source.PLAN and factor.size else source
                yield Place(own, factor.name, part)

    def _factor_sizes(
        self, size: int, factors: tuple[FactorTemplate, ...], tensor: str
    ) -> list[int]:
        """The sizes of factors, of which one may not be known."""
        found = [each.size or self._sizes.get(each.name, 0) for each in factors]
        if len(found) == 1:
            return [size]
        unknown = [i for i, each in enumerate(found) if not each]
        if len(unknown) > 1:
            names = " and ".join(f"`{factors[i].name}`" for i in unknown)
            raise CompilerError(
                f"the sizes of {names} in `{tensor}` are not determined",
                help=f"bind `{factors[unknown[0]].name}` with `let` in the plan, or name it in "
                "another layout",
            )
        for i in unknown:
            found[i] = size // max(1, prod(each for each in found if each))
        if prod(found) != size:
            raise CompilerError(
                f"`{' '.join(map(str, factors))}` does not make {size}, the size of a dim of "
                f"`{tensor}`",
                help="change the factors",
            )
        return found

    def _resolve(self, places: list[Place]) -> None:
        """Give atoms their formulas: names of one atom first, then what is left of products."""
        for source in Source:
            for place in (each for each in places if each.source is source):
                self._name(place, most=1, alone=True)
            for place in (each for each in places if each.source <= source):
                self._name(place, most=1)
        for place in places:
            self._name(place, most=len(expanded(place.dim)))

    def _name(self, place: Place, most: int, *, alone: bool = False) -> None:
        """The largest factor without a name becomes the name over the others, if at most so many
        have none."""
        atoms = expanded(place.dim)
        left = [atom for atom in atoms if atom not in self.named]
        if not left or len(left) > most or (alone and len(atoms) > 1):
            return
        largest = max(left, key=lambda atom: atom.size)
        others = [self.named.get(a, sympy.Integer(a.size)) for a in atoms if a is not largest]
        self.named[largest] = symbol(place.name) / sympy.Mul(*others)
        self.values[place.name] = self._sizes[place.name]

    def atom(self, atom: Atom) -> sympy.Expr:
        """The formula of an atom that is no product; a number where it has no name."""
        if atom not in self._known:
            self._known[atom] = self._formula(atom)
        return self._known[atom]

    def _formula(self, atom: Atom) -> sympy.Expr:
        if atom in self.named:
            return self.named[atom]
        if atom.axes:
            return sympy.Mul(*map(symbol, atom.axes))
        if atom.block is not None:
            dim, axes = atom.block
            return self.dim(dim) / sympy.Mul(*map(symbol, axes))
        if atom.sums:
            return sympy.Add(*map(self.dim, atom.sums), atom.plus)
        return sympy.Integer(atom.size)

    def dim(self, dim: Dim) -> sympy.Expr:
        """The formula of a dim."""
        return sympy.Mul(*map(self.atom, expanded(dim)))


def _pairs(
    shape: Shape, dims: tuple[DimTemplate | EllipsisType, ...]
) -> Iterator[tuple[Dim, DimTemplate]]:
    """Each dim with what a layout says of it; of `...`, nothing."""
    split = dims.index(...) if ... in dims else len(dims)
    after: tuple[Any, ...] = dims[split + 1 :]
    before: tuple[Any, ...] = dims[:split]
    yield from zip(shape, before, strict=False)
    yield from zip(shape[len(shape) - len(after) :], after, strict=True)


def _is_size(value: object) -> bool:
    return isinstance(value, int)

"""What a rank holds of each value, as numbers with formulas."""

from __future__ import annotations

import math
from collections.abc import Iterable

import sympy
from torch import nn

from meshwright.compiler.graph.ir import INPUT, InputKind, Node
from meshwright.compiler.layout.factors import Dim as LayoutDim
from meshwright.compiler.layout.factors import local_size
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.frame import BUCKET
from meshwright.compiler.program import Compiled, Stored
from meshwright.compiler.report.cost.dims import Dim
from meshwright.compiler.report.cost.named import Mark, Named, total
from meshwright.compiler.report.cost.naming import Names, symbol
from meshwright.compiler.report.cost.trace import Shape, Trace
from meshwright.compiler.report.memory.prediction import Sizes
from meshwright.compiler.report.memory.tensors import Storage


class NamedSizes(Sizes):
    """Sizes of one rank with their formulas, each counted in the repeated block that it belongs to.

    Of what has no formula, such as what kernels need inside themselves, it gives plain numbers.
    """

    def __init__(self, program: Compiled, trace: Trace, names: Names) -> None:
        super().__init__(program.stages[0].forward.mesh)
        self.program, self.trace, self.names = program, trace, names
        self.blocks = repeated(program.model)
        self._of_node: dict[Node, tuple[tuple[int, ...] | None, ...]] = {}

    def mark(self, path: str) -> Mark | None:
        """The block that a module or a parameter is in."""
        parts = path.split(".")
        for i in range(1, len(parts)):
            if parts[i].isdecimal() and ".".join(parts[:i]) in self.blocks:
                return ".".join(parts[:i]), int(parts[i])
        return None

    def shapes(self, node: Node) -> tuple[tuple[int, ...] | None, ...]:
        """The shape of what a rank holds of each result of a node."""
        if node not in self._of_node:
            traced = zip(self.trace.shapes[node], node.results, strict=True)
            self._of_node[node] = tuple(
                None if shape is None or layout is None else self._local(shape, layout)
                for shape, (_, layout) in traced
            )
        return self._of_node[node]

    def ranks(self, axes: Iterable[str]) -> Named:
        """The number of ranks along axes."""
        return axes_product(axes, self.mesh)

    def value(self, node: Node) -> Named:
        """Of a node that is one tensor; of a bucket, part by part."""
        itemsize = node.tensor.dtype.itemsize
        if node.op == BUCKET:
            parts = (_product(self._local(self.trace.of(part), part.placed)) for part in node.args)
            marks = (self.mark(part.origin.module) for part in node.args)
            return total(
                (part * itemsize).at(mark) for part, mark in zip(parts, marks, strict=True)
            )
        (shape,) = self.shapes(node)
        assert shape is not None
        return _product(shape) * itemsize

    def stored(self, stored: Stored) -> Named:
        return self._numel_stored(stored) * stored.type.dtype.itemsize

    def state(self, stored: Stored | None, size: int) -> int:
        """As many numbers for each element as for those of other parameters, and the rest."""
        if stored is None:
            return size
        numel = self._numel_stored(stored)
        each, rest = divmod(size, int(numel)) if numel else (0, size)
        return numel * each + Named.of(rest, rest).at(self.mark(stored.name))

    def storage(self, storage: Storage) -> int:
        node = storage.node
        if node is None:
            return storage.num_bytes
        known = self.results(node)
        found = next((size for size in known if size == storage.num_bytes), None)
        if found is None and sum(map(int, known)) == storage.num_bytes:
            found = total(known)
        return storage.num_bytes if found is None else found

    def results(self, node: Node) -> list[Named]:
        """The bytes of each result of a node."""
        path = str(node.args[1]) if node.op == INPUT else node.origin.module
        if node.op == BUCKET:
            return [self.value(node)]
        return [
            (_product(shape) * type.dtype.itemsize).at(self.mark(path))
            for shape, (type, _) in zip(self.shapes(node), node.results, strict=True)
            if shape is not None and type is not None
        ]

    def _numel_stored(self, stored: Stored) -> Named:
        inputs, layout = self.trace.inputs, stored.layout
        kinds = (InputKind.PARAMETER, InputKind.BUFFER)
        shape = next((inputs[k, stored.name] for k in kinds if (k, stored.name) in inputs), None)
        # What no graph takes has sizes without names.
        local = layout.local_shape(self.mesh) if shape is None else self._local(shape, layout)
        return _product(local).at(self.mark(stored.name))

    def _local(self, shape: Shape, layout: Layout) -> tuple[int, ...]:
        return tuple(self._part(dim, of) for dim, of in zip(shape, layout.dims, strict=True))

    def _part(self, dim: Dim, layout: LayoutDim) -> Named:
        """The size of a rank's part of a dim."""
        sizes = [math.prod(factor.size for factor in segment) for segment in layout]
        share = sympy.Add(
            *(
                sympy.Rational(size, sum(sizes) or 1)
                / sympy.Mul(*(symbol(axis) for factor in segment for axis in factor.axes))
                for size, segment in zip(sizes, layout, strict=True)
            )
        )
        return Named.of(local_size(layout, self.mesh), self.names.dim(dim) * share)


def _product(shape: Iterable[int]) -> Named:
    found = Named.of(1, 1)
    for size in shape:
        found = found * (size if isinstance(size, Named) else Named.of(size, size))
    return found


def repeated(model: nn.Module) -> dict[str, int]:
    """The lists of equal modules, by name, with how many there are; not those inside others."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        kinds = {type(child) for child in module.children()}
        many = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
        if many and len(kinds) == 1 and not any(name.startswith(f"{each}.") for each in found):
            found[name] = len(list(module.children()))
    return found


def axes_product(axes: Iterable[str], mesh: Mesh) -> Named:
    """The number of ranks along axes."""
    names = tuple(axes)
    return Named.of(mesh.size(names), sympy.Mul(*map(symbol, names)))

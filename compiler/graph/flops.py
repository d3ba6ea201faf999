"""The floating-point operations of a node: those of its products, attention and convolutions.

A multiplication and an addition are two. Torch's own formulas are taken where it has them, which is
for the operators that its kernels are written for; here is one row for each other.
Elsewhere: torch.utils.flop_counter, which counts what runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch.utils import flop_counter

from meshwright.compiler.graph.ir import MeshOp, Node, Op, map_nodes
from meshwright.compiler.layout.mesh import Mesh

aten = torch.ops.aten

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = "tuple[Shape | None, ...]"
Formula: TypeAlias = Callable[..., int]
"""From the shape of the first result and the arguments, with shapes in place of tensors."""

_SDPA: Formula = flop_counter.sdpa_flop_count
_SDPA_BACKWARD: Formula = flop_counter.sdpa_backward_flop_count


class Measures(Protocol):
    """The sizes that operations are counted by: those of `LocalSizes`, or others."""

    def shapes(self, node: Node) -> Shapes:
        """The shape of a rank's part of each result of a node; None for what is not a tensor."""

    def ranks(self, axes: Iterable[str]) -> int:
        """The number of ranks along axes."""


class LocalSizes:
    """What a rank of `mesh` holds, and how many ranks there are."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def shapes(self, node: Node) -> Shapes:
        """The shape of a rank's part of each result of a node; None for what is not a tensor."""
        layouts = (layout for _, layout in node.results)
        return tuple(layout.local_shape(self.mesh) if layout else None for layout in layouts)

    def ranks(self, axes: Iterable[str]) -> int:
        """The number of ranks along axes."""
        return self.mesh.size(axes)


def flops(node: Node, mesh: Mesh, sizes: Measures | None = None) -> int:
    """The operations of a placed node on one rank, in one turn of each loop.

    They are 0 for an operator that has no formula: what is computed element by element is not
    counted. Sizes are those of `mesh`, or what `sizes` gives in their place.
    """
    packet = getattr(node.op, "overloadpacket", None)
    if node.op not in _FORMULAS and packet not in flop_counter.flop_registry:
        return 0
    sizes = sizes or LocalSizes(mesh)
    found = sizes.shapes(node)
    args = map_nodes(node.args, lambda operand: sizes.shapes(operand)[0])
    if formula := _FORMULAS.get(node.op):
        assert found[0] is not None
        return _blocks(node, sizes) * formula(found[0], *args)
    out = found if isinstance(node.type, tuple) else found[0]
    counted: int = flop_counter.flop_registry[packet](*args, **node.kwargs, out_val=out)
    return counted


def _blocks(node: Node, sizes: Measures) -> int:
    """How many blocks like its own each rank meets."""
    if node.op not in _SUMMED:
        return 1
    axes = node.args[_SUMMED[node.op]]
    return sizes.ranks((axes if isinstance(axes, str) else axes[-1],))


def _product(out: Shape, first: Shape, *rest: Any) -> int:
    """Each element of the result sums over the last dim of the first operand."""
    return 2 * math.prod(out) * first[-1]


def _transposed(out: Shape, first: Shape, *rest: Any) -> int:
    """Each element of the result sums over all dims but the last of the first operand."""
    return 2 * math.prod(out) * math.prod(first[:-1])


def _panel(out: Shape, first: Shape, second: Shape, form: str) -> int:
    return (_transposed if form == "tn" else _product)(out, first)


def _by_matrices(out: Shape, x: Shape, *rest: Any) -> int:
    """The first operand meets each of the matrices behind it."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(each) for each in _shapes(rest))


def _of_pairs(out: Shape, *args: Any) -> int:
    shapes = _shapes(args)
    pairs = zip(shapes[::2], shapes[1::2], strict=True)
    return sum(2 * math.prod(x[:-1]) * math.prod(matrix) for x, matrix in pairs)


def _sums(out: Shape, x: Shape, *rest: Any) -> int:
    """Each element of a result sums over all dims but the last of both operands."""
    return 2 * math.prod(x) * sum(each[-1] for each in _shapes(rest))


def _shapes(args: Iterable[Any]) -> list[Shape]:
    return list(itertools.takewhile(lambda each: isinstance(each, tuple), args))


def _vector(out: Shape, matrix: Shape, *rest: Any) -> int:
    return 2 * math.prod(matrix)


def _einsum(out: Shape, equation: str, operands: tuple[Shape, ...], *rest: Any) -> int:
    """A multiplication or an addition by each operand, for each value of all letters."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, operands, strict=True):
        for letter, size in zip(_letters(term, len(shape)), shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return len(operands) * math.prod(sizes.values()) if len(operands) > 1 else 0


def _letters(term: str, num_dims: int) -> list[str]:
    """The letters of a term, and numbers from the right for those of its ellipsis."""
    before, _, after = term.partition("...")
    hidden = num_dims - len(before) - len(after)
    return [*before, *map(str, reversed(range(hidden))), *after]


def _convolution(transposed: bool) -> Formula:
    def formula(out: Shape, x: Shape, weight: Shape, *rest: Any) -> int:
        batched = (x, out) if len(x) == len(weight) else ((1, *x), (1, *out))
        return flop_counter.conv_flop_count(
            [*batched[0]], [*weight], [*batched[1]], transposed=transposed
        )

    return formula


def _recurrent(out: Shape, x: Shape, states: Any, weights: tuple[Shape, ...], *rest: Any) -> int:
    """Each matrix meets each step of each sequence."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(each) for each in weights if len(each) == 2)


def _attention(out: Shape, query: Shape, key: Shape, value: Shape, *rest: Any) -> int:
    """Every head of queries meets one of keys, which may serve several."""
    heads = query[1]
    return _SDPA(query, (key[0], heads, *key[2:]), (value[0], heads, *value[2:]))


def _attention_backward(out: Shape, grad: Shape, q: Shape, k: Shape, v: Shape, *rest: Any) -> int:
    heads = q[1]
    return _SDPA_BACKWARD(grad, q, (k[0], heads, *k[2:]), (v[0], heads, *v[2:]))


def _ring(formula: Formula, num_operands: int) -> Formula:
    """Every block of keys, of which a rank has one at a time; their number is the last of the six
    options behind the operands."""

    def every(out: Shape, *args: Any) -> int:
        blocks: int = args[num_operands + 5]
        return blocks * formula(out, *args)

    return every


_FORMULAS: Mapping[Op, Formula] = {
    aten.linear.default: _product,
    aten.matmul.default: _product,
    aten.mv.default: _vector,
    aten.dot.default: _vector,
    aten.addmv.default: lambda out, added, matrix, *rest: _vector(out, matrix),
    aten.einsum.default: _einsum,
    **dict.fromkeys(
        (
            aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
            aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
        ),
        _convolution(transposed=False),
    ),
    **dict.fromkeys(
        (
            aten.conv_transpose1d.default, aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
        ),
        _convolution(transposed=True),
    ),
    **dict.fromkeys(
        (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input), _recurrent
    ),
    MeshOp("attention"): _attention,
    MeshOp("attention_backward"): _attention_backward,
    MeshOp("summa"): _by_matrices,
    MeshOp("summa_transposed"): _of_pairs,
    MeshOp("summa_sum"): _sums,
    MeshOp("product_3d"): _by_matrices,
    MeshOp("product_3d_transposed"): _of_pairs,
    MeshOp("product_3d_sum"): _sums,
    MeshOp("panel_product"): _panel,
    MeshOp("add_panel_product"): lambda out, total, *rest: _panel(out, *rest),
    MeshOp("ring_attention"): _ring(_attention, 4),
    MeshOp("ring_attention_backward"): _ring(_attention_backward, 7),
    MeshOp("ring_step"): _attention,
    MeshOp("ring_step_backward"): _attention_backward,
    MeshOp("grouped_mm"): _product,
    MeshOp("grouped_mm_weight"): lambda out, x, grad, *rest: 2 * math.prod(grad) * x[-1],
}  # fmt: skip

_SUMMED: Mapping[Op, int] = {
    MeshOp("summa"): -2, MeshOp("summa_transposed"): -2, MeshOp("summa_sum"): -1,
    MeshOp("product_3d"): -2, MeshOp("product_3d_transposed"): -1, MeshOp("product_3d_sum"): -2,
}  # fmt: skip
"""Operators on blocks: the argument that names the axis whose coordinates each rank meets, of
multiple axes the last."""

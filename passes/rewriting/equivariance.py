"""What an operator gives where a dim of its operands has its elements in another order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from meshwright.compiler.composites.grouped import GroupedMMWeight
from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import MeshOp, Node, Op, TensorType
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.calls import make_call
from meshwright.compiler.placing.rules.lookup import rule_for
from meshwright.compiler.placing.rules.notation import Call, Operand, Spec

aten = torch.ops.aten

_RESHAPES = {
    aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.squeeze.default,
}  # fmt: skip

IN_ANY_ORDER: set[Op] = {
    aten.sum.default, aten.sum.dim_IntList, aten.amax.default, aten.amin.default,
    aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims,
    aten.histc.default, aten.mm.default, aten.bmm.default, aten.matmul.default,
    aten.linear.default, aten.mv.default, aten.dot.default, aten.einsum.default,
    GroupedMMWeight.op,
}  # fmt: skip
"""Operators that reduce a dim by a sum, or by another operation in which order does not count."""


def carried(node: Node, dims: Mapping[int, int], mesh: Mesh) -> tuple[int | None, ...] | None:
    """By result, the dim that is permuted as the operands are, or None where the result is the same
    in any order.

    `dims` are the permuted dims by number of operand; all are permuted alike. None if the operator
    is not known to treat each element of those dims by itself.
    """
    if node.op in _RESHAPES:
        place = _reshaped(node.operands()[0].tensor.shape, dims[0], node.tensor.shape)
        return None if place is None else (place,)
    found = spec_of(node, mesh)
    letter = _letter(found[1], dims) if found else None
    if found is None or letter is None:
        return None
    results: list[int | None] = []
    for term in found[1].results:
        places = [i for i, name in enumerate(term or ()) if name == letter]
        if len(places) > 1 or (not places and node.op not in IN_ANY_ORDER):
            return None
        results.append(places[0] if places else None)
    return tuple(results)


def spec_of(node: Node, mesh: Mesh) -> tuple[Call, Spec] | None:
    """A call of an operator that draws no random numbers of its own, and its letters, if any."""
    if not isinstance(node.op, MeshOp) and torch.Tag.nondeterministic_seeded in node.op.tags:
        return None

    def operand(value: Node) -> Operand:
        differentiable = value.requires_grad and node.requires_grad
        return Operand(value.tensor, replicated(value.tensor.shape), differentiable=differentiable)

    try:
        call = make_call(node.op, node.args, node.kwargs, node.type, mesh, operand)
        found = rule_for(node.op)(call)
    except LayoutError:
        return None
    return (call, found) if isinstance(found, Spec) else None


def _letter(spec: Spec, dims: Mapping[int, int]) -> str | None:
    """The letter of the permuted dims, if it stands for them and for nothing else."""
    letters = {spec.operands[i][dim] for i, dim in dims.items()}
    letter = letters.pop()
    if letters or not letter or letter in spec.whole | spec.inner | spec.derived:
        return None
    for i, term in enumerate(spec.operands):
        places = [place for place, name in enumerate(term) if name == letter]
        if i not in spec.ignored and places != ([dims[i]] if i in dims else []):
            return None
    return letter


def _reshaped(old: Sequence[int], dim: int, new: Sequence[int]) -> int | None:
    """The dim of the new shape that a dim of the old one becomes as it is."""
    before, size = math.prod(old[:dim]), old[dim]
    for place, length in enumerate(new):
        if length == size and math.prod(new[:place]) == before:
            return place
    return None


def is_vector(node: Node) -> bool:
    """Whether a node is one tensor of one dim."""
    return isinstance(node.type, TensorType) and len(node.type.shape) == 1

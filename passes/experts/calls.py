"""One node of what is written for one expert, or for one row of one, done for all of them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.autodiff.vjp import plain
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.fragment import FragmentCall, read, traced
from meshwright.compiler.graph.ir import Arg, Builder, MeshOp, Node, Op, TensorType, map_nodes
from meshwright.compiler.graph.slots import filled, slotted
from meshwright.passes.rewriting.rewriter import emit_for

aten = torch.ops.aten


class BatchedCall:
    """One node, to be emitted for `count` experts or rows, which are a leading dim of its results;
    `mapping` has what stands for its operands, of which the `batched` ones have that dim."""

    def __init__(
        self,
        builder: Builder,
        node: Node,
        mapping: Mapping[Node, Node],
        batched: Container[Node],
        count: int,
    ) -> None:
        self.builder, self.node, self.mapping = builder, node, mapping
        self.batched, self.count = batched, count

    def emitted(self) -> tuple[Node, ...]:
        """The results of the node."""
        x, weight, bias = product_of(self.node)
        if weight is not None and weight in self.batched:
            return (self._products(x, weight, bias),)
        if self.node.op in NORMS:
            return (self._norm(),)
        if is_elementwise(self.node.op):
            return (self._pointwise(),)
        return self._traced()

    def _products(self, x: Node, weight: Node, bias: Node | None) -> Node:
        rows = math.prod(x.tensor.shape[:-1])
        matrix = self._of_all(weight)
        if self.node.op == aten.linear.default:
            matrix = self._emit(aten.transpose.int, matrix, 1, 2)
        given = self._emit(
            aten.view.default, self._of_all(x), [self.count, rows, x.tensor.shape[-1]]
        )
        y = self._emit(aten.bmm.default, given, matrix)
        if bias is not None:
            shape = [self.count, 1, bias.tensor.shape[-1]]
            own = self._emit(aten.view.default, self._of_all(bias), shape)
            y = self._emit(aten.add.Tensor, y, own)
        return self._emit(aten.view.default, y, [self.count, *self.node.tensor.shape])

    def _norm(self) -> Node:
        """A norm without weights, then those of each expert."""
        x, shape, *rest = self.node.args
        num_weights = 2 if self.node.op == aten.layer_norm.default else 1
        weights = (*rest[:num_weights], None, None)[:2]
        given = (*(None,) * num_weights, *rest[num_weights:])
        y = self._emit(self.node.op, self._of_all(x), shape, *given)
        between = (1,) * (len(x.tensor.shape) - len(shape))
        for op, weight in zip((aten.mul.Tensor, aten.add.Tensor), weights, strict=True):
            if weight is not None:
                size = [self.count, *between, *shape]
                y = self._emit(op, y, self._emit(aten.view.default, self._of_all(weight), size))
        return y

    def _pointwise(self) -> Node:
        """The same operator: operands with fewer dims than the result keep theirs at the right."""
        dims = len(self.node.tensor.shape)

        def aligned(operand: Node) -> Node:
            found, shape = self.mapping[operand], operand.tensor.shape
            if operand not in self.batched or len(shape) == dims:
                return found
            between = (1,) * (dims - len(shape))
            return self._emit(aten.view.default, found, [self.count, *between, *shape])

        args = map_nodes(self.node.args, aligned)
        kwargs = {key: map_nodes(value, aligned) for key, value in self.node.kwargs.items()}
        type = self._stacked(self.node.tensor)
        return emit_for(self.node, self.builder, self.node.op, args, kwargs, type=type)

    def _traced(self) -> tuple[Node, ...]:
        """The operators that `torch.vmap` makes of the node's."""
        node = self.node
        operands = node.operands()
        args, kwargs = slotted(node.args, node.kwargs)
        in_dims = tuple(0 if each in self.batched else None for each in operands)

        def one(*tensors: Tensor) -> Any:
            given = filled(args, tensors)
            assert not isinstance(node.op, MeshOp), "composites are made later"
            return node.op(*given, **{key: filled(value, tensors) for key, value in kwargs})

        def every(tensors: list[Tensor]) -> Any:
            return torch.vmap(one, in_dims=in_dims)(*tensors)

        try:
            types = [self.mapping[each].tensor for each in operands]
            graph = plain(traced(every, types, functional=True))
        except Exception as error:
            raise CaptureError(
                f"`{node.op}` cannot run for all experts at once: {type(error).__name__}",
                culprit=f"{node.origin.module} {node.origin.source}".strip(),
                help="name a module without it, or write it with other operators",
            ) from error
        given = [each for each in graph.nodes if each.op == "placeholder"]
        (output,) = (each for each in graph.nodes if each.op == "output")
        results = output.args[0] if isinstance(output.args[0], (tuple, list)) else [output.args[0]]
        fragment = read(f"`{node.op}` of all experts", given, results)
        found = fragment.replay([self.mapping[each] for each in operands], self._replayed)
        return tuple(each for each in found if each is not None)

    def _replayed(
        self, place: int, call: FragmentCall, args: tuple[Arg, ...], kwargs: dict[str, Arg]
    ) -> Node:
        return emit_for(self.node, self.builder, call.op, args, kwargs, type=call.type)

    def _of_all(self, value: Node) -> Node:
        """A value for all experts: repeated, if it is the same for each."""
        found = self.mapping[value]
        if value in self.batched:
            return found
        return self._emit(aten.expand.default, found, [self.count, *value.tensor.shape])

    def _stacked(self, type: TensorType) -> TensorType:
        return TensorType((self.count, *type.shape), type.dtype)

    def _emit(self, op: Op, *args: Arg) -> Node:
        return emit_for(self.node, self.builder, op, args)


def product_of(node: Node) -> tuple[Any, Any, Any]:
    """Operand, weight `[o, i]` or `[i, o]` and bias of a product with a matrix; None of any other
    node."""
    args, op = node.args, node.op
    if op == aten.linear.default:
        return (*args, None)[:3] if len(args) < 3 else args
    if op == aten.addmm.default and not node.kwargs:
        return args[1], args[2], args[0]
    if op in (aten.mm.default, aten.matmul.default) and len(args[1].tensor.shape) == 2:
        return args[0], args[1], None
    return None, None, None


def is_elementwise(op: Op) -> bool:
    """Whether an operator treats each element alone."""
    return torch.Tag.pointwise in getattr(op, "tags", ()) or op in _ELEMENTWISE


NORMS: frozenset[Op] = frozenset({aten.layer_norm.default, aten.rms_norm.default})
"""Norms of the last dims, whose weights come after these."""
_ELEMENTWISE: set[Op] = {
    aten.dropout.default, aten.alias.default, aten.contiguous.default, aten.detach.default,
    aten.rand_like.default, aten.randn_like.default,
}  # fmt: skip
"""Operators that treat each element alone, and that torch does not call pointwise."""

"""Embedding lookup: of a table whose rows are split, each rank reads its own, zeros elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from meshwright.compiler.graph.ir import Arg, MeshOp, NodeType, TensorType
from meshwright.compiler.kernels import embedding as kernels
from meshwright.compiler.layout.extents import Extent
from meshwright.compiler.layout.factors import Dim, dim_axes
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    composite,
)
from meshwright.compiler.placing.rules.notation import Call, Row, Spec


def _offset(binding: BindingContext, rows: Dim) -> int:
    return binding.start(rows) if dim_axes(rows) else -1


@composite
class Embedding(Composite):
    """`embedding(weight, index, padding_idx[, num_rows])`: `num_rows` leave out a padded table's
    padding."""

    op = MeshOp("embedding")
    rule = Row("v^ d, ... -> ... d", linear=((0,),))
    is_fresh = True

    def result_type(self, weight: TensorType, index: TensorType, *rest: Arg) -> NodeType:
        return TensorType((*index.shape, *weight.shape[1:]), weight.dtype)

    def padded(self, args: tuple[Arg, ...], extents: Mapping[int, Extent]) -> tuple[Arg, ...]:
        return (*args, extents[0].true) if 0 in extents else args

    def adjoint(self, context: AdjointContext) -> Cotangents:
        weight, index, padding_idx = context.node.args[:3]
        args = (context.grad, index, weight.tensor.shape[0], padding_idx)
        return [context.call(EmbeddingBackward.op, *args), None]

    def bind(self, binding: BindingContext) -> Kernel:
        table = binding.operand(0)
        offset = _offset(binding, table.placed.dims[0])
        num_rows = (*binding.node.args[3:], table.tensor.shape[0])[0]
        return partial(kernels.embedding, num_rows=num_rows, offset=offset)


@composite
class EmbeddingBackward(Composite):
    """`embedding_backward(grad, index, num_rows, padding_idx)`: the gradient of the table."""

    op = MeshOp("embedding_backward")
    adds = True

    def rule(self, call: Call) -> Spec:
        """The rows may be split as a user of the result asks."""
        return replace(Row("... d, ... -> v^ d", linear=((0,),))(call), free=frozenset("v"))

    def result_type(
        self, grad: TensorType, index: TensorType, num_rows: int, *rest: Arg
    ) -> NodeType:
        return TensorType((num_rows, grad.shape[-1]), grad.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        table = binding.node.placed
        return partial(
            kernels.embedding_backward,
            num_rows=table.local_shape(binding.mesh)[0],
            offset=_offset(binding, table.dims[0]),
            padding_idx=binding.node.args[3],
        )

    def bind_adding(self, binding: BindingContext) -> Kernel:
        return partial(
            kernels.add_embedding_backward,
            offset=_offset(binding, binding.node.placed.dims[0]),
            padding_idx=binding.node.args[3],
        )

"""The functions that generated code calls for an operator.

Python's own bindings, where they are the operator exactly, cost a third less a call than its
overload. A few operators read memory as if their operands were contiguous, and do not check or
refuse: a rank's part need not be contiguous where the model's own tensor was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.graph.ir import MeshOp, Node, Op
from meshwright.compiler.kernels import products
from meshwright.compiler.layout.mesh import Mesh

aten = torch.ops.aten


def _named(function: Callable[..., Any], name: str = "") -> tuple[str, Callable[..., Any]]:
    return (name or function.__name__, function)


def _on_contiguous(op: Op) -> tuple[str, Callable[..., Any]]:
    """The operator on contiguous copies of whatever tensors are not."""
    assert not isinstance(op, MeshOp)

    def call(*args: Any, **kwargs: Any) -> Any:
        dense = [arg.contiguous() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return op(*dense, **kwargs)

    return _named(call, str(op).replace(".", "_"))


def _copied(like: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`source` in the shape and type of `like`: torch's own copies the gaps between the entries of
    `like` as well."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device).copy_(source, non_blocking)


_nn = torch._C._nn

CONTIGUOUS: tuple[Op, ...] = (
    aten.as_strided.default,
    aten.as_strided_copy.default,
    aten.as_strided_scatter.default,
    aten.view.dtype,
    aten.view_as_complex.default,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten.nll_loss2d_backward.default,
    aten.adaptive_max_pool2d_backward.default,
    aten.adaptive_max_pool3d_backward.default,
    aten.fractional_max_pool2d_backward.default,
    aten.fractional_max_pool3d_backward.default,
    aten._embedding_bag.default,
    aten._embedding_bag_backward.default,
    aten._embedding_bag_per_sample_weights_backward.default,
    aten._weight_norm_interface.default,
    aten._weight_norm_interface_backward.default,
    aten._linalg_det.default,
    aten._linalg_slogdet.default,
    aten.linalg_det.default,
    aten.linalg_slogdet.default,
    aten.logdet.default,
    aten.det.default,
    aten.slogdet.default,
    aten._pdist_forward.default,
    aten._pdist_backward.default,
)
"""Operators whose kernels assume contiguous operands, or whose derivatives do: that of a
determinant reads the factors of the transpose, which a contiguous matrix has."""

FAST: dict[Op, tuple[str, Callable[..., Any]]] = {
    **{op: _on_contiguous(op) for op in CONTIGUOUS},
    aten.copy.default: _named(_copied, "copied"),
    aten.linear.default: _named(_nn.linear, "linear"),
    aten.gelu.default: _named(_nn.gelu, "gelu"),
    aten.silu.default: _named(_nn.silu, "silu"),
    aten.view.default: _named(torch.reshape),
    aten._unsafe_view.default: _named(torch.reshape),
    aten.view_as.default: _named(torch.Tensor.reshape_as, "reshape_as"),
    aten.expand.default: _named(torch.Tensor.expand, "expand"),
    aten.sum.dim_IntList: _named(torch.sum),
    aten.transpose.int: _named(torch.transpose),
    aten.permute.default: _named(torch.permute),
    aten.unsqueeze.default: _named(torch.unsqueeze),
    aten.squeeze.dim: _named(torch.squeeze, "squeeze"),
    aten.select.int: _named(torch.select),
    aten.split.Tensor: _named(torch.Tensor.split, "split"),
    aten.unbind.int: _named(torch.unbind),
    aten.cat.default: _named(torch.cat),
    aten.ne.Scalar: _named(torch.ne),
    aten.where.self: _named(torch.where),
    aten.pow.Tensor_Scalar: _named(torch.pow),
    **{
        getattr(aten, name).Tensor: _named(getattr(torch, name))
        for name in ("add", "sub", "mul", "div")
    },
    **{
        getattr(aten, name).default: _named(getattr(torch, name))
        for name in (
            "mm", "bmm", "matmul", "addmm", "t", "neg", "rsqrt", "exp", "log", "tanh", "sum",
            "sin", "cos", "relu", "sigmoid",
        )
    },
}  # fmt: skip

LARGE: dict[Op, Callable[..., Any]] = {
    aten.linear.default: products.linear,
    aten.matmul.default: products.matmul,
    aten.addmm.default: products.addmm,
    aten.mm.default: products.mm,
    aten.bmm.default: products.bmm,
}
"""Products that a rank may leave to oneDNN where they are large."""


def is_large_product(node: Node, mesh: Mesh) -> bool:
    """Whether a node is a product by one matrix, or one for each of many, in float32, that is large
    on a rank."""
    if node.op not in LARGE or node.kwargs or node.tensor.dtype != torch.float32:
        return False
    operands = [operand.placed.local_shape(mesh) for operand in node.operands()]
    bias = operands.pop(0) if node.op == aten.addmm.default else ()
    *rows, columns = node.placed.local_shape(mesh)
    if node.op == aten.bmm.default:
        return products.is_large(rows[1], operands[0][-1], columns)
    if len(operands[0]) < 2 or len(operands[1]) != 2 or len(bias) > 1:
        return False
    return products.is_large(math.prod(rows), operands[0][-1], columns) and bias in ((), (columns,))


def large_product(op: Op) -> Callable[[RankContext], Callable[..., Any]]:
    """What makes the function of a large product for a rank."""
    return lambda context: LARGE[op] if products.is_faster(context.device) else FAST[op][1]

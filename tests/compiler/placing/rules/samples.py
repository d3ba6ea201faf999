"""Sample calls of every operator that has a rule, of small odd and even sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.graph.annotate import LAYOUT
from meshwright.compiler.graph.ir import MeshOp
from meshwright.compiler.placing.rules.resampling import INTERPOLATIONS, INTERPOLATIONS_BACKWARD
from tests.compiler.placing.rules import references
from tests.compiler.placing.rules.brute import Sample

aten: Any = torch.ops.aten
_RANDOM = torch.Generator().manual_seed(0)


def f(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_RANDOM, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return f(*shape).abs() + 0.5


def n(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_RANDOM)


def bits(*shape: int) -> Tensor:
    return n(2, *shape).bool()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def call(op: Any, *args: Any, **kwargs: Any) -> Sample:
    return Sample(op, args, kwargs, op)


def backward(op: Any, *args: Any, **kwargs: Any) -> Sample:
    """Of an operator that is never differentiated itself."""
    return Sample(op, args, kwargs, op, gradients=False)


def mesh(
    name: str, *args: Any, special: tuple[tuple[int, int], ...] = (), gradients: bool = True
) -> Sample:
    function: Callable[..., Any] = getattr(references, name)
    return Sample(MeshOp(name), args, {}, function, gradients, special)


PRODUCTS = [
    call(aten.linear.default, f(2, 4, 6), f(8, 6)),
    call(aten.linear.default, f(3, 6), f(4, 6), f(4)),
    call(aten.linear.default, f(6), f(4, 6)),
    call(aten.mm.default, f(4, 6), f(6, 2)),
    call(aten.bmm.default, f(4, 3, 6), f(4, 6, 2)),
    call(aten.mv.default, f(4, 6), f(6)),
    call(aten.dot.default, f(4), f(4)),
    call(aten.outer.default, f(4), f(6)),
    call(aten.addmm.default, f(6), f(4, 2), f(2, 6)),
    call(aten.addmm.default, f(1, 6), f(4, 2), f(2, 6)),
    call(aten.addmm.default, f(4, 6), f(4, 2), f(2, 6), beta=2, alpha=3),
    call(aten.addmv.default, f(4), f(4, 6), f(6)),
    call(aten.baddbmm.default, f(2, 4, 6), f(2, 4, 2), f(2, 2, 6)),
    call(aten.baddbmm.default, f(1, 4, 6), f(2, 4, 2), f(2, 2, 6)),
    call(aten.matmul.default, f(4, 6), f(6, 2)),
    call(aten.matmul.default, f(6), f(6)),
    call(aten.matmul.default, f(4, 6), f(6)),
    call(aten.matmul.default, f(6), f(2, 6, 4)),
    call(aten.matmul.default, f(2, 4, 6), f(6, 2)),
    call(aten.matmul.default, f(2, 1, 4, 6), f(4, 6, 2)),
    call(aten.einsum.default, "bshd,bthd->bhst", [f(2, 3, 4, 2), f(2, 6, 4, 2)]),
    call(aten.einsum.default, "...i,oi->...o", [f(2, 4, 6), f(2, 6)]),
    call(aten.einsum.default, "oi, ...i", [f(2, 6), f(4, 6)]),
    call(aten.einsum.default, "iij->ij", [f(4, 4, 6)]),
]

POINTWISE = [
    call(aten.add.Tensor, f(2, 4, 6), f(2, 4, 6)),
    call(aten.add.Tensor, f(2, 4, 6), f(6), alpha=2),
    call(aten.add.Tensor, f(4, 6), 1.0),
    call(aten.add.Tensor, f(4, 1), f(1, 6)),
    call(aten.sub.Tensor, f(4, 6), f(4, 6)),
    call(aten.rsub.Scalar, f(4, 6), 1.0),
    call(aten.mul.Tensor, f(2, 4, 6), f(4, 1)),
    call(aten.mul.Tensor, f(4, 6), 2.0),
    call(aten.mul.Scalar, f(4, 6), 2.0),
    call(aten.div.Tensor, f(4, 6), positive(4, 6)),
    call(aten.div.Tensor, f(4, 6), 2.0),
    call(aten.div.Scalar, f(4, 6), 2.0),
    backward(aten.div.Tensor_mode, f(4, 6), positive(6), rounding_mode="floor"),
    call(aten.neg.default, f(4, 6)),
    call(aten.conj_physical.default, f(4, 6)),
    call(aten.conj.default, f(4, 6)),
    backward(aten._conj.default, torch.complex(f(4, 6), f(4, 6))),
    call(aten._neg_view.default, f(4, 6)),
    call(aten.resolve_conj.default, f(4, 6)),
    call(aten.resolve_neg.default, f(4, 6)),
    backward(aten.real.default, torch.complex(f(4, 6), f(4, 6))),
    backward(aten.imag.default, torch.complex(f(4, 6), f(4, 6))),
    call(aten.complex.default, f(4, 6), f(4, 6)),
    call(aten.polar.default, f(4, 6), f(6)),
    call(aten.positive.default, f(4)),
    call(aten.clone.default, f(4, 6)),
    call(aten.contiguous.default, f(4, 6)),
    call(aten.alias.default, f(4, 6)),
    backward(aten.detach.default, f(4, 6)),
    call(aten.lift_fresh_copy.default, f(4)),
    call(aten.lift_fresh.default, f(4)),
    call(LAYOUT, f(4, 6), "[4, 6]"),
    call(aten._to_copy.default, f(4, 6), dtype=torch.float64),
    backward(aten._to_copy.default, f(4, 6), dtype=torch.int64),
    call(aten.to.dtype, f(4, 6), torch.float64),
    backward(aten.to.dtype, n(5, 4, 6), torch.float64),
    call(aten.to.device, f(4, 6), "cpu", torch.float64),
    call(aten.to.dtype_layout, f(4, 6), dtype=torch.float64),
    call(aten.to.other, f(4, 6), f(2)),
    call(aten.type_as.default, f(4, 6), f(4, 6)),
    call(aten.where.self, bits(4, 6), f(4, 6), f(4, 6)),
    call(aten.where.self, bits(4, 6), f(4, 6), zeros()),
    call(aten.where.self, bits(4, 1), f(4, 6), f()),
    call(aten.where.ScalarOther, bits(4, 6), f(4, 6), 0),
    call(aten.where.ScalarOther, bits(4, 6), f(4, 6), 1.0),
    call(aten.where.ScalarSelf, bits(4, 6), 0.0, f(4, 6)),
    call(aten.where.ScalarSelf, bits(4, 6), 2.0, f(6)),
    call(aten.masked_fill.Scalar, f(4, 6), bits(4, 1), 0),
    call(aten.masked_fill.Scalar, f(4, 6), bits(6), -1.0),
    call(aten.masked_fill.Tensor, f(4, 6), bits(4, 6), f()),
    call(aten.lerp.Scalar, f(4, 6), f(4, 6), 0.3),
    call(aten.addcmul.default, f(4, 6), f(4, 6), f(6), value=2.0),
    call(aten.addcdiv.default, f(4, 6), f(4, 6), positive(6)),
    call(aten.pow.Tensor_Scalar, f(4, 6), 2),
    call(aten.pow.Tensor_Tensor, positive(4, 6), f(4, 6)),
    call(aten.exp.default, f(4, 6)),
    backward(aten.frexp.Tensor, f(4, 6)),
    call(aten.log.default, positive(4, 6)),
    call(aten.rsqrt.default, positive(4, 6)),
    call(aten.sqrt.default, positive(4, 6)),
    call(aten.cos.default, f(4, 6)),
    call(aten.sin.default, f(4, 6)),
    call(aten.tanh.default, f(4, 6)),
    call(aten.sigmoid.default, f(4, 6)),
    call(aten.relu.default, f(4, 6)),
    call(aten.gelu.default, f(4, 6), approximate="tanh"),
    call(aten.silu.default, f(4, 6)),
    call(aten.softplus.default, f(4, 6)),
    call(aten.leaky_relu.default, f(4, 6)),
    call(aten.elu.default, f(4, 6)),
    call(aten.hardtanh.default, f(4, 6)),
    call(aten.abs.default, f(4, 6)),
    call(aten.clamp.default, f(4, 6), -0.5, 0.5),
    call(aten.clamp_min.default, f(4, 6), 0.0),
    call(aten.maximum.default, f(4, 6), f(6)),
    call(aten.min.other, f(4, 6), f(4, 6)),
    call(aten.max.other, f(4, 6), f(4, 6)),
    call(aten.reciprocal.default, positive(4, 6)),
    call(aten.eq.Scalar, n(3, 4, 6), 1),
    call(aten.ne.Scalar, n(3, 4, 6), 1),
    call(aten.le.Tensor, n(3, 4, 1), n(3, 6)),
    call(aten.gt.Scalar, f(4, 6), 0),
    call(aten.lt.Tensor, f(4, 6), f(4, 6)),
    call(aten.ge.Scalar, n(3, 4), 1),
    call(aten.__and__.Tensor, bits(4, 6), bits(4, 1)),
    call(aten.__and__.Scalar, n(8, 4, 6), 3),
    call(aten.__or__.Tensor, n(8, 4, 6), n(8, 6)),
    call(aten.__or__.Scalar, n(8, 4, 6), 3),
    call(aten.__xor__.Tensor, n(8, 4, 6), n(8, 6)),
    call(aten.__xor__.Scalar, n(8, 4, 6), 3),
    call(aten.__lshift__.Tensor, n(8, 4, 6), n(3, 6)),
    call(aten.__rshift__.Tensor, n(8, 4, 6), n(3, 6)),
    call(aten.isclose.default, f(4, 6), f(4, 6), atol=0.5),
    call(aten.nan_to_num.default, f(4, 6)),
    call(aten.bitwise_and.Tensor, bits(4, 6), bits(4, 1)),
    call(aten.bitwise_not.default, bits(4, 6)),
    call(aten.logical_not.default, bits(4, 6)),
    call(aten.logical_and.default, bits(4, 6), bits(4, 6)),
    call(aten.isnan.default, f(4, 6)),
    call(aten.sign.default, f(4, 6)),
    backward(aten.copy.default, f(4, 6), f(6)),
    call(aten.fill.Tensor, f(4, 6), f()),
    call(aten.fill.Scalar, f(4, 6), 2.0),
    call(aten.expand_as.default, f(4, 1), f(4, 6)),
    backward(aten.zeros_like.default, f(4, 6)),
    backward(aten.ones_like.default, f(4, 6)),
    backward(aten.full_like.default, f(4, 6), 3.0),
]

POINTWISE_BACKWARD = [
    backward(aten.gelu_backward.default, f(4, 6), f(4, 6), approximate="none"),
    backward(aten.silu_backward.default, f(4, 6), f(4, 6)),
    backward(aten.tanh_backward.default, f(4, 6), f(4, 6).tanh()),
    backward(aten.sigmoid_backward.default, f(4, 6), f(4, 6).sigmoid()),
    backward(aten.threshold_backward.default, f(4, 6), f(4, 6), 0),
    backward(aten.elu_backward.default, f(4, 6), 1.0, 1.0, 1.0, False, f(4, 6)),
    backward(aten.leaky_relu_backward.default, f(4, 6), f(4, 6), 0.1, False),
    backward(aten.softplus_backward.default, f(4, 6), f(4, 6), 1.0, 20.0),
    backward(aten.hardtanh_backward.default, f(4, 6), f(4, 6), -1.0, 1.0),
    backward(aten.hardswish_backward.default, f(4, 6), f(4, 6)),
    backward(aten.hardsigmoid_backward.default, f(4, 6), f(4, 6)),
    backward(aten.mish_backward.default, f(4, 6), f(4, 6)),
    backward(aten.logit_backward.default, f(4, 6), positive(4, 6) / 10),
    backward(aten.log_sigmoid_backward.default, f(4, 6), f(4, 6), f(4, 6).sigmoid()),
    backward(aten.native_dropout_backward.default, f(4, 6), bits(4, 6), 2.0),
]

VIEWS = [
    call(aten.view.default, f(4, 6), [24]),
    call(aten.view.default, f(8, 6), [2, 4, -1]),
    call(aten.view.default, f(2, 4, 6), [8, 3, 2]),
    call(aten.reshape.default, f(4, 12), [4, 3, 2, 2]),
    call(aten.reshape.default, f(4, 1, 6), [4, 6]),
    call(aten._unsafe_view.default, f(4, 6), [2, 12]),
    call(aten._reshape_copy.default, f(4, 6), [2, 12]),
    call(aten.view_copy.default, f(4, 6), [2, 12]),
    call(aten.flatten.using_ints, f(2, 4, 6), 1),
    call(aten.unflatten.int, f(2, 12), -1, [3, -1]),
    call(aten.ravel.default, f(2, 4)),
    call(aten.squeeze.default, f(2, 1, 4)),
    call(aten.squeeze.dim, f(2, 1, 4), 1),
    call(aten.squeeze.dims, f(1, 4, 1), [0, -1]),
    call(aten.unsqueeze.default, f(2, 4), -1),
    call(aten.view_as.default, f(4, 6), f(8, 3)),
    call(aten.reshape_as.default, f(4, 6), f(2, 2, 6)),
    call(aten.permute.default, f(2, 3, 4), [2, 0, -2]),
    call(aten.permute_copy.default, f(2, 3, 4), [2, 0, 1]),
    call(aten.transpose.int, f(2, 3, 4), -1, 0),
    call(aten.transpose_copy.int, f(2, 3, 4), 1, 2),
    call(aten.swapaxes.default, f(2, 3, 4), 1, 2),
    call(aten.t.default, f(2, 4)),
    call(aten.t.default, f(4)),
    call(aten.t_copy.default, f(2, 4)),
    call(aten.numpy_T.default, f(2, 4)),
    call(aten.mT.default, f(2, 4, 6)),
    call(aten.view_as_complex.default, f(4, 6, 2)),
    backward(aten.view_as_real.default, torch.complex(f(4, 6), f(4, 6))),
    call(aten.adjoint.default, f(2, 4, 6)),
    call(aten.matrix_H.default, f(4, 6)),
    call(aten.movedim.int, f(2, 4, 6), 0, -1),
    call(aten.movedim.intlist, f(2, 4, 6), [0, 1], [2, 0]),
    call(aten.expand.default, f(4, 1), [2, 4, 6]),
    call(aten.expand.default, f(4, 6), [-1, 6]),
    call(aten.expand_copy.default, f(1, 4), [6, 4]),
    call(aten.broadcast_to.default, f(4, 1), [4, 6]),
    call(aten.as_strided.default, f(4, 6), [4, 3], [6, 2]),
    call(aten.unfold.default, f(4, 6), 1, 2, 2),
    call(aten.diagonal.default, f(4, 4)),
]

SLICES = [
    call(aten.split.Tensor, f(4, 12), 4, 1),
    call(aten.split.Tensor, f(10, 3), 4),
    call(aten.split.sizes, f(4, 8), [6, 2], -1),
    call(aten.split_with_sizes.default, f(4, 8), [4, 2, 2], 1),
    call(aten.unsafe_split.Tensor, f(4, 12), 6, 1),
    call(aten.chunk.default, f(12, 2), 3),
    call(aten.unsafe_chunk.default, f(2, 12), 2, 1),
    call(aten.tensor_split.sections, f(12, 2), 3),
    call(aten.slice.Tensor, f(4, 8), 1, 0, 4),
    call(aten.slice.Tensor, f(4, 12), -1, -4, 9223372036854775807),
    call(aten.slice.Tensor, f(8, 2), 0, 1, 6, 2),
    call(aten.slice.Tensor, f(8, 2)),
    call(aten.slice_copy.Tensor, f(8, 2), 0, 6, 8),
    call(aten.narrow.default, f(4, 8), 1, -4, 4),
    call(aten.select.int, f(3, 4, 6), 0, 1),
    call(aten.select.int, f(2, 4), -1, -1),
    call(aten.select_copy.int, f(2, 4), 0, 1),
    call(aten.unbind.int, f(2, 4, 6)),
    call(aten.unbind.int, f(2, 4, 2), 2),
    call(aten.cat.default, [f(4, 2), f(4, 6)], 1),
    call(aten.cat.default, [f(4, 2), f(4, 2), f(4, 2)], -1),
    call(aten.cat.default, [f(3, 2), f(1, 2)]),
    call(aten.stack.default, [f(4, 2), f(4, 2)], -1),
    call(aten.constant_pad_nd.default, f(4, 6), [1, 0]),
    call(aten.constant_pad_nd.default, f(2, 4, 6), [0, -2, 2, 0]),
    call(aten.constant_pad_nd.default, f(4, 6), [1, 0], 2.0),
    call(aten.pad.default, f(4, 6), [1, 1]),
    call(aten.pad.default, f(4, 6), [1, 1], "constant", 2.0),
    call(aten.pad.default, f(2, 4, 6), [1, 1], "reflect"),
    call(aten.slice_scatter.default, f(4, 6), f(4, 2), 1, 1, 3),
    call(aten.select_scatter.default, f(4, 6), f(4), 1, 2),
    backward(aten.select_backward.default, f(4, 6), [4, 3, 6], 1, 2),
    backward(aten.slice_backward.default, f(4, 4), [4, 8], 1, 4, 8, 1),
    backward(aten.slice_backward.default, f(4, 2), [4, 8], 1, 0, 4, 2),
    backward(aten.slice_backward.default, f(2, 6), [8, 6], 0, 2, 4, 1),
    call(aten.repeat.default, f(4, 6), [2, 3, 1]),
    call(aten.tile.default, f(4, 6), [2]),
    call(aten.repeat_interleave.self_int, f(2, 4), 3, 1),
    call(aten.repeat_interleave.self_int, f(2, 4), 2),
    call(aten.repeat_interleave.self_int, f(4, 2), 2, 0, output_size=8),
]

REDUCTIONS = [
    call(aten.sum.default, f(4, 6)),
    call(aten.sum.dim_IntList, f(2, 4, 6), [0, -1]),
    call(aten.sum.dim_IntList, f(2, 4, 6), [1], True),
    call(aten.sum.dim_IntList, n(5, 2, 4), []),
    call(aten.mean.default, f(4, 6)),
    call(aten.mean.dim, f(4, 6), [-1], True),
    call(aten.amax.default, f(4, 6), [1]),
    call(aten.amin.default, f(4, 6), [0], True),
    call(aten.max.default, f(4, 6)),
    call(aten.min.default, f(4, 6)),
    call(aten.any.default, bits(4, 6)),
    call(aten.any.dim, bits(4, 6), 1),
    call(aten.any.dims, bits(4, 6), [0], True),
    call(aten.any.dims, bits(4, 6), []),
    call(aten.all.default, bits(2, 2)),
    call(aten.all.dim, bits(4, 6), 0, True),
    call(aten.all.dims, bits(4, 6), [0]),
    call(aten.all.dims, bits(4, 6), []),
    call(aten.max.dim, f(4, 6), 1),
    call(aten.min.dim, f(4, 6), 0, True),
    call(aten.argmax.default, f(4, 6), 1),
    call(aten.argmin.default, f(4, 6)),
    call(aten.prod.default, f(4, 6)),
    call(aten.prod.dim_int, f(4, 6), 1),
    call(aten.logsumexp.default, f(4, 6), [-1]),
    call(aten.linalg_vector_norm.default, f(4, 6), 2, [1], True),
    call(aten.norm.ScalarOpt_dim, f(4, 6), 2, [1]),
    call(aten.norm.Scalar, f(4, 6), 2),
    call(aten.var.correction, f(4, 6), [1], correction=0, keepdim=True),
    call(aten.var.dim, f(4, 6), [1]),
    call(aten.std.correction, f(4, 6), [0]),
    call(aten.var_mean.correction, f(4, 6), [1], keepdim=True),
    call(aten.median.dim, f(4, 6), 1),
    call(aten.count_nonzero.default, n(2, 4, 6)),
    call(aten.count_nonzero.dim_IntList, n(2, 4, 6), [1]),
]

ALONG = [
    call(aten._softmax.default, f(2, 4, 6), -1, False),
    call(aten.softmax.int, f(4, 6), 0),
    call(aten._safe_softmax.default, f(4, 6), -1),
    call(aten._log_softmax.default, f(4, 6), 1, False),
    call(aten.log_softmax.int, f(4, 6), 1),
    backward(aten._softmax_backward_data.default, f(4, 6), f(4, 6).softmax(1), 1, torch.float64),
    backward(
        aten._log_softmax_backward_data.default, f(4, 6), f(4, 6).log_softmax(0), 0, torch.float64
    ),
    call(aten.cumsum.default, f(4, 6), -1),
    call(aten.cumprod.default, f(4, 6), 0),
    call(aten.logcumsumexp.default, f(4, 6), 0),
    call(aten.cummax.default, f(4, 6), 1),
    call(aten.cummin.default, f(4, 6), 1),
    call(aten.sort.default, f(4, 6)),
    call(aten.sort.stable, f(4, 6), stable=True, dim=0),
    call(aten.argsort.default, f(4, 6), 0),
    call(aten.argsort.stable, f(4, 6), stable=True, dim=1),
    call(aten.topk.default, f(4, 6), 2),
    call(aten.topk.default, f(4, 6), 3, 0),
    call(aten.diff.default, f(4, 6)),
    call(aten.diff.default, f(4, 6), 1, -1, f(4, 1)),
    call(aten.flip.default, f(4, 6), [0]),
    call(aten.roll.default, f(4, 6), [1], [1]),
    call(aten.roll.default, f(4, 6), [1]),
    call(aten.tril.default, f(2, 4, 6)),
    call(aten.triu.default, f(4, 6), 1),
    call(aten.layer_norm.default, f(2, 4, 6), [6], f(6), f(6)),
    call(aten.layer_norm.default, f(2, 4, 6), [4, 6]),
    call(aten.native_layer_norm.default, f(2, 4, 6), [6], f(6), f(6), 1e-5),
    call(aten.rms_norm.default, f(4, 6), [6], f(6)),
    call(aten.native_group_norm.default, f(2, 4, 3), f(4), f(4), 2, 4, 3, 2, 1e-5),
    call(aten.group_norm.default, f(2, 4, 3), 2, f(4), f(4)),
    backward(
        aten.native_group_norm_backward.default,
        *(f(2, 4, 3), f(2, 4, 3), f(2, 2), positive(2, 2), f(4), 2, 4, 3, 2),
        [True, True, True],
    ),
    backward(
        aten._native_batch_norm_legit_functional.default,
        *(f(2, 4, 6), f(4), f(4), f(4), positive(4), True, 0.1, 1e-5),
    ),
    call(aten._native_batch_norm_legit.no_stats, f(2, 4, 6), f(4), f(4), True, 0.1, 1e-5),
    backward(
        aten._native_batch_norm_legit_no_training.default,
        *(f(2, 4, 6), f(4), f(4), f(4), positive(4), 0.1, 1e-5),
    ),
    call(aten.native_batch_norm.default, f(2, 4), f(4), f(4), None, None, True, 0.1, 1e-5),
    backward(
        aten.native_batch_norm_backward.default,
        *(f(2, 4, 6), f(2, 4, 6), f(4), None, None, f(4), positive(4), True, 1e-5),
        [True, True, True],
    ),
]

INDEXING = [
    call(aten.embedding.default, f(6, 4), n(6, 2, 3)),
    backward(aten.embedding_dense_backward.default, f(2, 3, 4), n(6, 2, 3), 6, -1, False),
    call(aten.one_hot.default, n(5, 4, 2), 5),
    call(aten.index.Tensor, f(4, 6, 2), [torch.tensor([0, 3]), torch.tensor([5, 2])]),
    call(aten.index.Tensor, f(4, 6, 2), [None, n(6, 2, 4)]),
    call(aten.index.Tensor, f(4, 6, 2), [n(4, 2, 1), None, n(2, 3)]),
    call(aten._unsafe_index.Tensor, f(4, 6), [n(4, 8)]),
    call(aten.index_put.default, f(6, 4), [n(6, 2)], f(2, 4), True),
    call(aten.index_put.default, zeros(6, 4), [n(6, 2)], f(2, 4), True),
    call(aten.index_put.default, f(6, 4), [torch.tensor([1, 3])], f(4)),
    call(aten._unsafe_index_put.default, zeros(4, 6), [None, n(6, 2)], f(4, 2), True),
    call(aten.gather.default, f(4, 6), 1, n(6, 4, 2)),
    call(aten.gather.default, f(4, 6), 0, n(4, 2, 2)),
    call(aten.scatter_add.default, f(4, 6), 1, n(6, 4, 2), f(4, 2)),
    call(aten.scatter_add.default, zeros(4, 6), 1, n(6, 4, 2), f(4, 2)),
    backward(aten.scatter_add.default, zeros(4, 6), 0, n(4, 2, 6), f(4, 6)),
    call(aten.scatter.src, f(4, 6), 0, torch.arange(12).view(2, 6) % 4, f(2, 6)),
    call(aten.scatter.value, f(4, 6), 1, n(6, 4, 1), 0.0),
    call(aten.scatter.value, f(4, 6), 1, n(6, 4, 1), 1.0),
    call(aten.scatter_reduce.two, f(4, 6), 1, n(6, 4, 2), f(4, 2), "amax"),
    call(aten.index_select.default, f(4, 6), 1, n(6, 2)),
    call(aten.index_add.default, f(4, 6), 0, n(4, 2), f(2, 6)),
    call(aten.index_add.default, zeros(4, 6), 0, n(4, 2), f(2, 6)),
    call(aten.index_copy.default, f(4, 6), 0, torch.tensor([3, 1]), f(2, 6)),
    call(aten.index_copy.default, zeros(4, 6), 1, torch.tensor([3, 1]), f(4, 2)),
    call(aten.index_reduce.default, f(4, 6), 0, n(4, 2), f(2, 6), "amax"),
    call(aten.index_fill.int_Scalar, f(4, 6), 0, torch.tensor([3, 1]), 0),
    call(aten.index_fill.int_Scalar, f(4, 6), 1, torch.tensor([3, 1]), 0.5),
    call(aten.bucketize.Tensor, f(4, 6), torch.linspace(-1, 1, 4, dtype=torch.float64)),
    call(aten.isin.Tensor_Tensor, n(9, 4, 6), n(9, 4)),
]

_CONV = ([1], [0], [1], False, [0], 1)
_MASKS = ([True, True, True], [True, True, False], [False, True, False])
_GROUPED = (
    ((2, 4, 5), (4, 1, 3), 4),
    ((2, 4, 3), (8, 1, 2), 4),
    ((2, 8, 3), (8, 4, 2), 2),
    ((2, 8, 3), (8, 2, 2), 4),
)
"""Shapes of an input and a weight, and groups: each channel by itself, or multiple together."""


def _convolution(groups: int, *, transposed: bool) -> tuple[Any, ...]:
    return ([1], [0], [1], transposed, [0], groups)


def _grouped() -> list[Sample]:
    """Convolutions of groups, transposed ones, and the backward of both."""
    found = []
    for x, weight, groups in _GROUPED:
        for transposed in (False, True):
            if transposed:
                x = (x[0], weight[0], x[2])
            options = _convolution(groups, transposed=transposed)
            plain = (f(*x), f(*weight), None, *options)
            out = aten.convolution.default(*plain).shape
            found += [
                call(aten.convolution.default, *plain),
                call(aten.convolution.default, f(*x), f(*weight), f(out[1]), *options),
            ]
            for mask in _MASKS[:2]:
                arguments = (f(*out), f(*x), f(*weight), [out[1]], *options, mask)
                found.append(backward(aten.convolution_backward.default, *arguments))
    return found


def _interpolations() -> list[Sample]:
    """Each from 2 to 4 in every spatial dim, and its backward."""
    found = []
    for op in (*INTERPOLATIONS, *INTERPOLATIONS_BACKWARD):
        name = str(op)
        spatial = next(n for n in (1, 2, 3) if f"{n}d" in name)
        corners = (False,) if "linear" in name or "cubic" in name else ()
        small, large = [2] * spatial, [4] * spatial
        if "backward" in name:
            found.append(backward(op, f(2, 4, *large), large, [2, 4, *small], *corners))
        else:
            factors = (None,) if name.endswith("vec") else ()
            found.append(call(op, f(2, 4, *small), large, *corners, *factors))
    return found


CONVOLUTIONS = [
    call(aten.conv1d.default, f(2, 4, 5), f(6, 4, 3)),
    call(aten.conv1d.default, f(2, 4, 5), f(6, 4, 3), f(6)),
    call(aten.conv1d.padding, f(2, 4, 5), f(6, 4, 3), None, [1], "same"),
    call(aten.conv2d.default, f(2, 4, 4, 4), f(2, 4, 2, 2), f(2), [2, 2]),
    call(aten.conv2d.default, f(2, 4, 4, 4), f(4, 2, 2, 2), None, [2, 2], [0, 0], [1, 1], 2),
    call(aten.conv2d.padding, f(2, 2, 4, 4), f(2, 2, 2, 2), None, [2, 2], "valid"),
    call(aten.conv3d.default, f(2, 2, 2, 2, 2), f(2, 2, 2, 2, 2)),
    call(aten.conv3d.padding, f(2, 2, 2, 2, 2), f(2, 2, 1, 1, 1)),
    call(aten.convolution.default, f(2, 4, 5), f(6, 4, 3), f(6), *_CONV),
    call(aten.conv1d.default, f(4, 5), f(4, 1, 3), f(4), [1], [0], [1], 4),
    call(aten.conv2d.padding, f(2, 4, 2, 4), f(4, 1, 3, 3), f(4), [1], "same", [1], 4),
    call(aten.conv3d.default, f(1, 4, 2, 2, 2), f(4, 2, 1, 2, 2), None, [1], [0], [1], 2),
    call(aten.conv_transpose1d.default, f(2, 4, 5), f(4, 6, 3)),
    call(aten.conv_transpose1d.default, f(2, 4, 5), f(4, 6, 3), f(6)),
    call(aten.conv_transpose1d.default, f(2, 4, 5), f(4, 2, 3), f(8), [1], [0], [0], 4),
    call(aten.conv_transpose2d.input, f(2, 4, 2, 4), f(4, 2, 2, 2), None, [2], [0], [0], 2),
    call(aten.conv_transpose3d.input, f(1, 4, 2, 2, 2), f(4, 2, 1, 2, 2), f(4), [1], [0], [0], 2),
    call(aten.convolution.default, f(2, 4, 5), f(4, 6, 3), None, [1], [0], [1], True, [0], 1),
    *_grouped(),
    *_interpolations(),
    *(
        backward(
            aten.convolution_backward.default, f(2, 6, 3), f(2, 4, 5), f(6, 4, 3), [6], *_CONV, mask
        )
        for mask in _MASKS
    ),
]

FACTORIES = [
    backward(aten.zeros.default, [4, 6], dtype=torch.float64),
    backward(aten.ones.default, [4, 6], dtype=torch.float64),
    backward(aten.full.default, [4, 6], 2.0, dtype=torch.float64),
    backward(aten.new_zeros.default, f(4, 6), [2, 6]),
    backward(aten.new_ones.default, f(4, 6), [2, 6]),
    backward(aten.new_full.default, f(4, 6), [2, 6], 2.0),
    backward(aten.arange.default, 6),
    backward(aten.arange.start, 2, 6),
    backward(aten.arange.start_step, 2, 6, 2),
    backward(aten.linspace.default, 0, 1, 4, dtype=torch.float64),
    backward(aten.scalar_tensor.default, 2.0, dtype=torch.float64),
    backward(aten.eye.default, 4, dtype=torch.float64),
    backward(aten.eye.m, 4, 6, dtype=torch.float64),
    backward(aten.tril_indices.default, 2, 4),
    backward(aten.triu_indices.default, 2, 4),
]

_ROWS = (f(2, 3, 8), n(8, 2, 3))

_SLOTS = torch.tensor([[[0, 5], [-1, 3], [2, -1], [1, 4]], [[3, 1], [0, -1], [-1, 5], [4, 2]]])
_GROUPS = torch.tensor([[[0, 5], [1, 3], [2, 0], [1, 4]], [[3, 1], [0, 6], [2, 5], [4, 2]]])
# Groups that differ: of equal ones, parts would do for the whole.

COMPOSITES = [
    mesh("top", f(2, 4, 5), 2),
    mesh("top", n(3, 4, 12), 10),
    mesh("positions", n(3, 4, 6)),
    mesh("dispatch", f(2, 4, 6), _SLOTS, None, 8),
    mesh("dispatch", f(2, 4, 6), _SLOTS, f(2, 4, 2), 8, gradients=False),
    mesh("combine", f(2, 6, 4), _SLOTS, f(2, 4, 2)),
    mesh("combine", f(2, 6, 4), _SLOTS, None, gradients=False),
    mesh("combine_weight", f(2, 4, 6), f(2, 8, 6), _SLOTS, torch.float64, gradients=False),
    mesh("embedding", f(6, 4), n(6, 2, 3), None, special=((0, 0),)),
    mesh(
        "embedding_backward",
        *(f(2, 3, 4), n(6, 2, 3), 6, 2),
        special=((2, 0),),
        gradients=False,
    ),
    mesh("cross_entropy", *_ROWS, None, -100, 0.1, 8, special=((0, 2),)),
    mesh("cross_entropy", *_ROWS, positive(8), -100, 0.0, 8, special=((0, 2),), gradients=False),
    mesh(
        "cross_entropy_backward",
        *(f(2, 3), *_ROWS, f(2, 3), None, -100, 0.1, 8),
        special=((1, 2),),
        gradients=False,
    ),
    mesh("norm", f(2, 3, 4), f(4), f(4), 1e-5, "layer", special=((0, 2),)),
    mesh("norm", f(2, 3, 4), f(4), None, 1e-5, "rms", special=((0, 2),)),
    mesh(
        "norm_backward",
        *(f(2, 3, 4), f(2, 3, 4), f(2, 3), positive(2, 3), f(4), "layer", torch.float64),
        special=((1, 2),),
        gradients=False,
    ),
    mesh(
        "norm_backward",
        *(f(4, 4), f(4, 4), None, positive(4), f(4), "rms", None),
        special=((1, 1),),
        gradients=False,
    ),
    mesh("norm_stats", f(2, 3, 4), "layer"),
    mesh("norm_stats", f(2, 3, 4), "rms"),
    mesh(
        "norm_finish",
        *(f(2, 3, 4), positive(1, 2, 2, 3), f(4), f(4), 1e-5, "layer"),
        special=((0, 2),),
        gradients=False,
    ),
    mesh(
        "norm_backward_sums",
        *(f(2, 3, 4), f(2, 3, 4), f(2, 3), positive(2, 3), f(4), "layer"),
        gradients=False,
    ),
    mesh(
        "norm_backward_apply",
        *(f(2, 2, 3), f(2, 3, 4), f(2, 3, 4), f(2, 3), positive(2, 3), f(4)),
        *("layer", torch.float64),
        special=((2, 2),),
        gradients=False,
    ),
    mesh("cross_entropy_stats", *_ROWS, None, -100, 0.1, 8, gradients=False),
    mesh("cross_entropy_combine", f(1, 3, 2, 3), n(2, 2, 3), None, 1, 0.1, 8, gradients=False),
    mesh("dropout", f(4, 6), 0.1, 0),
    mesh("random", f(4, 6), (4, 6), "uniform", torch.float64, 0, gradients=False),
    mesh("standard_gamma", f(4, 6), (4, 6), 0),
    mesh("dirichlet", f(4, 6), (4, 6), 0),
    mesh("poisson", f(4, 6), (4, 6), 0),
    mesh("binomial", f(4, 6), f(4, 6), (4, 6), 0),
    backward(aten._standard_gamma_grad.default, positive(4, 6), positive(4, 6)),
    backward(aten._dirichlet_grad.default, f(4, 6).sigmoid(), positive(4, 6), positive(4, 6) + 1),
    mesh("extend", f(4, 3, 6), 1, 4),
    mesh("attention", *(f(2, 4, 3, 2) for _ in range(3)), None, True, None, 0.0, 0),
    mesh("attention", f(2, 4, 3, 2), f(2, 2, 3, 2), f(2, 2, 3, 4), None, False, None, 0.0, 0),
    mesh("attention", f(2, 4, 3, 2), f(2, 1, 5, 2), f(2, 1, 5, 2), None, False, 0.3, 0.0, 0),
    mesh("attention", *(f(2, 2, 3, 2) for _ in range(3)), f(2, 1, 3, 3), False, None, 0.0, 0),
    mesh("attention", *(f(2, 2, 3, 2) for _ in range(3)), f(1, 2, 1, 3), False, None, 0.0, 0),
    references.attention_backward_sample(f(2, 4, 3, 2), f(2, 4, 3, 2), f(2, 4, 3, 2), None),
    references.attention_backward_sample(f(2, 4, 3, 2), f(2, 2, 3, 2), f(2, 2, 3, 4), None),
    references.attention_backward_sample(f(2, 4, 3, 2), f(2, 1, 3, 2), f(2, 1, 3, 4), None),
    references.attention_backward_sample(
        f(2, 2, 3, 2), f(2, 2, 3, 2), f(2, 2, 3, 2), f(1, 2, 1, 3)
    ),
]

RECURRENT = [
    call(
        aten.lstm.input,
        *(f(3, 4, 2), [f(1, 4, 2), f(1, 4, 2)], [f(8, 2), f(8, 2), f(8), f(8)]),
        *(True, 1, 0.0, True, False, False),
    ),
    call(
        aten.lstm.input,
        *(f(4, 3, 2), [f(1, 4, 2), f(1, 4, 4)], [f(16, 2), f(16, 2), f(2, 4)]),
        *(False, 1, 0.0, True, False, True),
    ),
    call(
        aten.gru.input,
        *(f(3, 4, 2), f(2, 4, 2), [f(6, 2), f(6, 2), f(6, 2), f(6, 2)]),
        *(False, 1, 0.0, True, True, False),
    ),
    *(
        call(
            op,
            *(f(4, 3, 2), f(1, 4, 2), [f(2, 2), f(2, 2), f(2), f(2)]),
            *(True, 1, 0.0, True, False, True),
        )
        for op in (aten.rnn_tanh.input, aten.rnn_relu.input)
    ),
]

POOLS = [
    call(aten.max_pool1d.default, f(2, 4, 6), [2]),
    call(aten.max_pool2d.default, f(2, 4, 6, 5), [2, 2]),
    backward(aten.max_pool2d_with_indices.default, f(2, 4, 6, 5), [2, 2]),
    backward(
        aten.max_pool2d_with_indices_backward.default,
        *(f(2, 4, 2, 2), f(2, 4, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1], False, n(1, 2, 4, 2, 2)),
    ),
    call(aten.avg_pool1d.default, f(2, 4, 6), [2]),
    call(aten.avg_pool2d.default, f(2, 4, 6, 5), [2, 2]),
    backward(
        aten.avg_pool2d_backward.default,
        *(f(2, 4, 2, 2), f(2, 4, 4, 4), [2, 2], [2, 2], [0, 0], False, True, None),
    ),
    call(aten.adaptive_avg_pool1d.default, f(2, 4, 6), [3]),
    call(aten.adaptive_avg_pool2d.default, f(2, 4, 6, 4), [3, 2]),
    call(aten._adaptive_avg_pool2d.default, f(2, 4, 6, 4), [3, 2]),
    backward(aten._adaptive_avg_pool2d_backward.default, f(2, 4, 2, 2), f(2, 4, 4, 4)),
]

ROUTING = [
    backward(aten.floor_divide.default, n(9, 4, 6), 2),
    call(aten.slice.Tensor, f(12, 2), 0, 1, 9223372036854775807, 2),
    call(aten.slice.Tensor, f(2, 12), 1, 2, 12, 3),
    backward(aten.slice_backward.default, f(4, 4), [4, 8], 1, 1, 8, 2),
    backward(aten.histc.default, f(4, 6), 5, -2, 2),
    backward(aten.histc.default, positive(4, 6).cumsum(0).cumsum(1), 7),
    mesh("grouped_mm", f(4, 6), f(4, 6, 2), n(5, 4, 2)),
    mesh("grouped_mm_weight", f(4, 6), f(4, 2, 2), n(4, 4, 2), 4),
    mesh("grouped_mm", f(4, 2, 6), f(4, 6, 2), n(5, 4, 2)),
    mesh("panel_product", f(2, 4, 6), f(6, 4), "nn", gradients=False),
    mesh("panel_product", f(2, 4, 6), f(4, 6), "nt", gradients=False),
    mesh("panel_product", f(2, 4, 6), f(2, 4, 4), "tn", gradients=False),
    mesh("block_lookup", f(4, 6), n(4, 2, 4), 0, 4, gradients=False),
    mesh("block_lookup_backward", f(2, 4, 6), n(4, 2, 4), 4, 0, -1, gradients=False),
    mesh("grouped_mm_weight", f(4, 2, 6), f(4, 2, 2), n(4, 4, 2), 4),
    mesh("grouped_mm", f(2, 2, 4, 6), f(2, 4, 6, 2), n(5, 2, 2, 4)),
    mesh("grouped_mm_weight", f(2, 2, 4, 6), f(2, 2, 4, 2), n(4, 2, 2, 4), 4),
    mesh("to_owners", f(2, 4, 6), _GROUPS, 6, 2, 8, ("a",), special=((2, 1),)),
    mesh("to_owners", f(2, 4, 2, 6), _GROUPS, 6, 2, 6, ("a",), special=((2, 1),)),
    mesh("owned_groups", _GROUPS, 6, 2, 8, ("a",), special=((1, 1),)),
    mesh("from_owners", f(2, 2, 8, 6), _GROUPS, 6, 2, ("a",), special=((0, 1),)),
]

SAMPLES = [
    *PRODUCTS,
    *POINTWISE,
    *POINTWISE_BACKWARD,
    *VIEWS,
    *SLICES,
    *REDUCTIONS,
    *ALONG,
    *INDEXING,
    *CONVOLUTIONS,
    *FACTORIES,
    *COMPOSITES,
    *POOLS,
    *RECURRENT,
    *ROUTING,
]

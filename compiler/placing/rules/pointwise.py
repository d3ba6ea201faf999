"""Elementwise operators: the operands through which pending sums pass.

Torch knows which operators are elementwise (`torch.Tag.pointwise`), but not which are linear.
"""

from __future__ import annotations

import torch

from meshwright.compiler.graph.annotate import LAYOUT
from meshwright.compiler.graph.ir import Arg, MeshOp, Op
from meshwright.compiler.placing.rules.notation import Call, Row, tensor_arguments

aten = torch.ops.aten

Groups = tuple[tuple[int, ...], ...]


def pointwise(op: Op, linear: Arg = (), **options: Arg) -> Row:
    """A row of `...` for every tensor argument and result of an elementwise operator."""
    assert not isinstance(op, MeshOp), op
    terms = ", ".join("..." for _ in tensor_arguments(op))
    results = ", ".join("..." for _ in op._schema.returns)
    return Row(f"{terms} -> {results}", linear, **options)


def is_pointwise(op: Op) -> bool:
    """Whether torch says that the operator is elementwise, its operands broadcast."""
    return not isinstance(op, MeshOp) and torch.Tag.pointwise in op.tags


def cast_linear(call: Call) -> Groups:
    """A sum passes a cast between differentiable types: each summand is rounded by itself."""
    result = call.results[0]
    both = (call.operands[0].type, result)
    return ((0,),) if all(type is not None and type.differentiable for type in both) else ()


def _if_zero(place: int, term: int) -> Arg:
    """Linear in one term if the number at an argument's place is 0."""

    def linear(call: Call) -> Groups:
        return ((term,),) if call.arg(place) == 0 else ()

    return linear


def _divided(call: Call) -> Groups:
    """Linear in the numerator, unless the quotient is rounded."""
    return () if dict(call.kwargs).get("rounding_mode") else ((0,),)


_ONE = ((0,),)

LINEAR: dict[Op, Arg] = {
    aten.add.Tensor: "all",
    aten.sub.Tensor: "all",
    aten.mul.Tensor: "each",
    aten.mul.Scalar: _ONE,
    aten.div.Tensor: _ONE,
    aten.div.Scalar: _ONE,
    aten.div.Tensor_mode: _divided,
    aten.neg.default: _ONE,
    aten.conj_physical.default: _ONE,
    aten._conj.default: _ONE,
    aten._neg_view.default: _ONE,
    aten.conj.default: _ONE,
    aten.resolve_conj.default: _ONE,
    aten.resolve_neg.default: _ONE,
    aten.real.default: _ONE,
    aten.imag.default: _ONE,
    aten.complex.default: "all",
    aten.positive.default: _ONE,
    aten.clone.default: _ONE,
    aten.contiguous.default: _ONE,
    aten.alias.default: _ONE,
    aten.detach.default: _ONE,
    aten.lift_fresh_copy.default: _ONE,
    aten.lift_fresh.default: _ONE,
    LAYOUT: _ONE,
    aten._to_copy.default: cast_linear,
    aten.to.dtype: cast_linear,
    aten.to.device: cast_linear,
    aten.to.dtype_layout: cast_linear,
    aten.where.self: ((1, 2),),
    aten.where.ScalarOther: _if_zero(2, 1),
    aten.where.ScalarSelf: _if_zero(1, 1),
    aten.masked_fill.Scalar: _if_zero(2, 0),
    aten.masked_fill.Tensor: ((0, 2),),
    aten.lerp.Scalar: "all",
    aten.addcmul.default: ((0, 1), (0, 2)),
    aten.addcdiv.default: ((0, 1),),
    aten.gelu_backward.default: _ONE,
    aten.silu_backward.default: _ONE,
    aten.tanh_backward.default: _ONE,
    aten.sigmoid_backward.default: _ONE,
    aten.threshold_backward.default: _ONE,
    aten.elu_backward.default: _ONE,
    aten.leaky_relu_backward.default: _ONE,
    aten.softplus_backward.default: _ONE,
    aten.hardtanh_backward.default: _ONE,
    aten.hardswish_backward.default: _ONE,
    aten.hardsigmoid_backward.default: _ONE,
    aten.mish_backward.default: _ONE,
    aten.logit_backward.default: _ONE,
    aten.log_sigmoid_backward.default: _ONE,
    aten.native_dropout_backward.default: _ONE,
}
"""The terms of elementwise operators through which pending sums pass."""

VALUELESS: dict[Op, Arg] = {
    aten.copy.default: {"linear": ((1,),), "shape_only": (0,)},
    aten.fill.Tensor: {"linear": ((1,),), "shape_only": (0,)},
    aten.fill.Scalar: {"shape_only": (0,)},
    aten.expand_as.default: {"linear": _ONE, "shape_only": (1,)},
    aten.zeros_like.default: {"shape_only": (0,)},
    aten.ones_like.default: {"shape_only": (0,)},
    aten.full_like.default: {"shape_only": (0,)},
    aten.empty_like.default: {"shape_only": (0,)},
}
"""Elementwise operators that look only at the shape of one operand."""

UNTAGGED: tuple[Op, ...] = (
    aten.__and__.Tensor,
    aten.__and__.Scalar,
    aten.__or__.Tensor,
    aten.__or__.Scalar,
    aten.__xor__.Tensor,
    aten.__xor__.Scalar,
    aten.__lshift__.Tensor,
    aten.__rshift__.Tensor,
    aten.floor_divide.default,
    aten.isclose.default,
    aten.polar.default,
    aten.nan_to_num.default,
    aten._standard_gamma_grad.default,
    aten._dirichlet_grad.default,
)
"""Elementwise operators that torch does not tag as such."""

POINTWISE: dict[Op, Row] = {
    **{op: pointwise(op) for op in UNTAGGED},
    **{op: pointwise(op, linear) for op, linear in LINEAR.items()},
    **{op: pointwise(op, **options) for op, options in VALUELESS.items()},
}

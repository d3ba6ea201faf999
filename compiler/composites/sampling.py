"""Samples of distributions with a parameter for each element, by hashes of its global index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from meshwright.compiler.graph.ir import MeshOp, NodeType, TensorType
from meshwright.compiler.kernels import sampling as kernels
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    composite,
)
from meshwright.compiler.placing.rules.notation import Row

aten = torch.ops.aten


class _Sample(Composite):
    """`sample(*parameters, shape, op_id)`; the shape is given too: a padded operand would draw
    other numbers."""

    sampler: ClassVar[Callable[..., Tensor]]
    rule = Row("... -> ...")
    number = 2

    def result_type(self, parameter: TensorType, *rest: Any) -> NodeType:
        *_, shape, _ = rest
        return TensorType(tuple(shape), parameter.dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        *_, shape, op_id = binding.node.args
        index = binding.index(op_id, shape, binding.coordinates(binding.node.placed.dims))
        sampler = type(self).sampler
        return lambda *parameters: sampler(*parameters, index())


@composite
class StandardGamma(_Sample):
    """Gamma samples of scale 1."""

    op = MeshOp("standard_gamma")
    sampler = staticmethod(kernels.standard_gamma)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        """How a sample moves with its parameter, its quantile held (Figurnov et al., 2018)."""
        (x,) = context.operands
        slope = context.call(aten._standard_gamma_grad.default, x, context.results[0])
        return [context.call(aten.mul.Tensor, context.grad, slope)]


@composite
class Dirichlet(_Sample):
    """Rows that sum to 1."""

    op = MeshOp("dirichlet")
    rule = Row("... n! -> ... n")
    sampler = staticmethod(kernels.dirichlet)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        """Each row keeps its sum of 1; as in `torch.distributions.Dirichlet`."""
        (x,), (sample,) = context.operands, context.results
        total = context.call(aten.sum.dim_IntList, x, (-1,), True)
        total = context.call(aten.expand.default, total, x.tensor.shape)
        slope = context.call(aten._dirichlet_grad.default, sample, x, total)
        along = context.call(aten.mul.Tensor, sample, context.grad)
        along = context.call(aten.sum.dim_IntList, along, (-1,), True)
        across = context.call(aten.sub.Tensor, context.grad, along)
        return [context.call(aten.mul.Tensor, slope, across)]


@composite
class Poisson(_Sample):
    """Counts of events at these rates."""

    op = MeshOp("poisson")
    sampler = staticmethod(kernels.poisson)


@composite
class Binomial(_Sample):
    """Numbers of heads among this many coins, each with its probability."""

    op = MeshOp("binomial")
    rule = Row("..., ... -> ...")
    number = 3
    sampler = staticmethod(kernels.binomial)

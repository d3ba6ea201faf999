"""Cross entropy by rows; where the classes are split, statistics are exchanged.

`passes/lower.py` shows the loss before and after. The backward needs the log-sum-exp alone, and
moves nothing. Elsewhere: Megatron-LM's vocabulary-parallel loss (Shoeybi et al., 2019).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from meshwright.compiler.composites.statistics import gathered, per_rank
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, TensorType
from meshwright.compiler.kernels import cross_entropy as kernels
from meshwright.compiler.kernels.blocks import accumulation_dtype
from meshwright.compiler.layout.factors import dim_axes
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    LoweringContext,
    composite,
)
from meshwright.compiler.placing.rules.notation import Call, Row, Spec


def _options(binding: BindingContext, first: int) -> dict[str, Any]:
    names = ("ignore_index", "label_smoothing", "num_classes")
    return dict(zip(names, binding.node.args[first:], strict=True))


@composite
class CrossEntropy(Composite):
    """`cross_entropy(logits, target, weight, ignore_index, label_smoothing, num_classes)` gives
    `(loss, lse)` by rows."""

    op = MeshOp("cross_entropy")
    rule = Row("... v~^, ..., c!? -> ..., ...")

    def result_type(self, logits: TensorType, *rest: Arg) -> NodeType:
        rows = TensorType(logits.shape[:-1], accumulation_dtype(logits.dtype))
        return (rows, rows)

    def adjoint(self, context: AdjointContext) -> Cotangents:
        logits, target, *options = context.node.args
        lse = context.results[1]
        grad = context.call(CrossEntropyBackward.op, context.grad, logits, target, lse, *options)
        return [grad, *(None for _ in context.operands[1:])]

    def lower(self, context: LoweringContext) -> Node | None:
        logits, *rest = context.args
        axes = dim_axes(logits.placed.dims[-1])
        if not axes:
            return None
        stats = gathered(context, axes, CrossEntropyStats.op, *context.args)
        return context.call(CrossEntropyCombine.op, stats, *rest)

    def bind(self, binding: BindingContext) -> Kernel:
        options = _options(binding, 3)

        def cross_entropy(
            logits: Tensor, target: Tensor, weight: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            rows, lse = kernels.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), target.reshape(-1), weight=weight, **options
            )
            return rows.view(target.shape), lse.view(target.shape)

        return cross_entropy


@composite
class CrossEntropyBackward(Composite):
    """`cross_entropy_backward(grad, logits, target, lse, weight, ...)`: the logits' gradient."""

    op = MeshOp("cross_entropy_backward")
    rule = Row("..., ... v~, ..., ..., c!? -> ... v", linear=((0,),))
    overwrites = 1

    def result_type(self, grad: TensorType, logits: TensorType, *rest: Arg) -> NodeType:
        return logits

    def bind(self, binding: BindingContext) -> Kernel:
        options = _options(binding, 5)
        offset = binding.start(binding.operand(1).placed.dims[-1])
        overwrite = binding.node.kwargs.get("overwrite", False)

        def backward(
            grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, weight: Tensor | None
        ) -> Tensor:
            flat = logits.reshape(-1, logits.shape[-1])
            found = kernels.cross_entropy_backward(
                flat,
                target.reshape(-1),
                lse.reshape(-1),
                grad.reshape(-1),
                offset=offset,
                weight=weight,
                out=flat if overwrite and flat.is_contiguous() else None,
                **options,
            )
            return found.view(logits.shape)

        return backward


@composite
class CrossEntropyStats(Composite):
    """`cross_entropy_stats(logits, target, ...) -> [ranks, k, ...]`: what the loss needs of the
    classes on each rank."""

    op = MeshOp("cross_entropy_stats")

    def rule(self, call: Call) -> Spec:
        return per_rank(Row("... v~^, ..., c!? -> r k! ...")(call), call, "v")

    def result_type(self, logits: TensorType, *rest: Arg) -> NodeType:
        *_, label_smoothing, _ = rest
        shape = (1, 3 if label_smoothing else 2, *logits.shape[:-1])
        return TensorType(shape, accumulation_dtype(logits.dtype))

    def bind(self, binding: BindingContext) -> Kernel:
        options = _options(binding, 3)
        offset = binding.start(binding.operand(0).placed.dims[-1])

        def stats(logits: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
            found = kernels.cross_entropy_stats(
                logits.reshape(-1, logits.shape[-1]),
                target.reshape(-1),
                offset=offset,
                weight=weight,
                **options,
            )
            return found.view(1, -1, *target.shape)

        return stats


@composite
class CrossEntropyCombine(Composite):
    """`cross_entropy_combine(stats, target, ...) -> (loss, lse)`, from the parts of all ranks."""

    op = MeshOp("cross_entropy_combine")
    rule = Row("r! k! ..., ..., c!? -> ..., ...")

    def result_type(self, stats: TensorType, *rest: Arg) -> NodeType:
        rows = TensorType(stats.shape[2:], stats.dtype)
        return (rows, rows)

    def bind(self, binding: BindingContext) -> Kernel:
        options = _options(binding, 3)

        def combine(stats: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
            rows, lse = kernels.cross_entropy_combine(
                stats.reshape(*stats.shape[:2], -1), target.reshape(-1), weight=weight, **options
            )
            return rows.view(target.shape), lse.view(target.shape)

        return combine

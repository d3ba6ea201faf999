"""Split linears by output features.

Before:  up_weight: f32[64, 16] = input(parameter up.weight)
         up_bias: f32[64]       = input(parameter up.bias)
         linear: f32[8, 64]     = linear(x, up_weight, up_bias)
After:   up_weight: f32[64@tp, 16] = input(parameter up.weight)
         up_bias: f32[64@tp]       = input(parameter up.bias)
         linear: f32[8, 64@tp]     = linear(x, up_weight, up_bias)

`as (3 heads hd)` names the factors of a fused output, the first named of which is split.
Requires: a module that multiplies by a parameter. Ensures: weight and bias are pinned.
Elsewhere: Megatron's ColumnParallelLinear, DTensor's ColwiseParallel.
"""

from __future__ import annotations

from meshwright.dsl.statements import Columns
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.linears import linears
from meshwright.passes.statements.pins import pin, tensor_text, to_dim
from meshwright.passes.statements.targets import of_modules


def columns(draft: Draft) -> Draft:
    """Pin the weights and biases of every linear under a `columns` statement."""
    for statement, found in of_modules(linears, Columns, draft, "a linear"):
        for linear in found:
            shape, text = linear.weight.tensor.shape, tensor_text(linear.weight, shape=False)
            dim = to_dim(draft.plan.columns_dim(statement, shape, linear.features, text))
            draft = pin(draft, linear.weight, {linear.features: dim}, statement)
            for bias in linear.biases:
                draft = pin(draft, bias, {len(bias.tensor.shape) - 1: dim}, statement)
    return draft

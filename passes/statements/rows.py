"""Split linears by input features.

Before:  down_weight: f32[16, 64] = input(parameter down.weight)
         linear_1: f32[8, 16]     = linear(relu, down_weight, down_bias)
After:   down_weight: f32[16, 64@tp]      = input(parameter down.weight)
         linear_1: f32[8, 16] partial(tp) = linear(relu, down_weight)
         all_reduce: f32[8, 16]           = all_reduce(linear_1, tp)
         add: f32[8, 16]                  = add(all_reduce, down_bias)

The bias is added once, after the sum. Where what comes in is made of factors (heads), the weight's
input features take the same factors. Requires: a module that multiplies by a parameter.
Ensures: the weight is pinned; biases stay whole.
Elsewhere: Megatron's RowParallelLinear, DTensor's RowwiseParallel.
"""

from __future__ import annotations

from meshwright.compiler.layout.factors import cut
from meshwright.dsl.statements import Rows
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.linears import linears
from meshwright.passes.statements.pins import pin, tensor_text
from meshwright.passes.statements.targets import check_divides, of_modules


def rows(draft: Draft) -> Draft:
    """Pin the weight of every linear under a `rows` statement."""
    if not draft.plan.of(Rows):
        return draft
    for statement, found in of_modules(linears, Rows, draft, "a linear"):
        for linear in found:
            size = linear.weight.tensor.shape[linear.inputs]
            text = f"{tensor_text(linear.weight)}{list(linear.weight.tensor.shape)}"
            check_divides(draft, size, statement, text, "input features")
            dims = {linear.inputs: cut(size, *statement.over)}
            draft = pin(draft, linear.weight, dims, statement)
    return draft

"""Split linears by input features.

Before:  down_weight: f32[16, 64] = input(parameter down.weight)
         linear_1: f32[8, 16]     = linear(relu, down_weight, down_bias)
After:   down_weight: f32[16, 64@tp]      = input(parameter down.weight)
         linear_1: f32[8, 16] partial(tp) = linear(relu, down_weight)
         all_reduce: f32[8, 16]           = all_reduce(linear_1, tp)
         add: f32[8, 16]                  = add(all_reduce, down_bias)

The bias is added once, after the sum. Where the operand is made of factors (heads), the weight's
input features take the same factors.
Requires: a module that multiplies by a parameter. Ensures: the weight is pinned; biases stay whole.
Elsewhere: Megatron's RowParallelLinear, DTensor's RowwiseParallel.
"""

from __future__ import annotations

from meshwright.compiler.layout.factors import cut
from meshwright.dsl.errors import either
from meshwright.dsl.statements import Rows
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.linears import Linear, linears
from meshwright.passes.statements.pins import pin, tensor_text
from meshwright.passes.statements.targets import of_modules


def rows(draft: Draft) -> Draft:
    """Pin the weight of every linear under a `rows` statement."""
    for statement, found in of_modules(linears, Rows, draft, "a linear"):
        for linear in found:
            _check_divides(draft, linear, statement)
            size = linear.weight.tensor.shape[linear.inputs]
            dims = {linear.inputs: cut(size, *statement.over)}
            draft = pin(draft, linear.weight, dims, statement)
    return draft


def _check_divides(draft: Draft, linear: Linear, statement: Rows) -> None:
    """Raises `PlanError` where the input features do not divide over the statement's axes."""
    size, ranks = linear.weight.tensor.shape[linear.inputs], draft.mesh.size(statement.over)
    if size % ranks == 0:
        return
    over = ", ".join(f"{axis}={draft.mesh.size(axis)}" for axis in statement.over)
    usable = [str(n) for n in range(2, min(size, 64) + 1) if size % n == 0][:8]
    choices = " or ".join(filter(None, [", ".join(usable[:-1]), *usable[-1:]]))
    help = f"use {statement.over[0]}={choices}"
    if len(statement.over) > 1:
        help = f"give {either(statement.over, 'and')} sizes whose product is {choices}"
    raise draft.plan.error(
        "P203",
        f"cannot split {size} input features over {over}",
        statement.at("over"),
        subject=tensor_text(linear.weight),
        help=help if usable else "leave it whole",
    )

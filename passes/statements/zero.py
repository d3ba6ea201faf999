"""Store parameters split over ranks that use them whole.

Before:  up_weight: f32[64, 16]        = input(parameter up.weight)
         vary: f32[64, 16] varying(dp) = vary(up_weight, dp)
         linear: f32[8@dp, 64]         = linear(x, vary, vary_1)
After:   up_weight: f32[64@dp, 16]          = input(parameter up.weight)
         all_gather_replicated: f32[64, 16] = all_gather_replicated(up_weight, dp)
         vary: f32[64, 16] varying(dp)      = vary(all_gather_replicated, dp)
         linear: f32[8@dp, 64]              = linear(x, vary, vary_1)

The optimizer steps the part of each parameter that a rank stores, so its state is split as well.
That holds for every level: they differ in when parameters are gathered and gradients scattered.
Level 1 gathers once a step and scatters once, after the last microbatch; level 2 scatters in every
microbatch, so that no rank holds whole gradients; level 3 gathers before each use as well, once
more for the backward, so that no rank holds whole parameters. With `every=step`, the default in a
pipeline, levels 2 and 3 send as level 1 does: ranks have whole weights and gradients of their own
stages alone, and what they send does not grow with the number of microbatches. A parameter is split
along the first dim that divides; where none does, storage adds zeros to what each rank uses of it.
A scalar stays whole: no rank can hold less than one entry.
Requires: pins of the statements that split what operators use. Ensures: `stored` and `zero`.
Elsewhere: ZeRO (Rajbhandari et al., 1910.02054), FSDP2's fully_shard.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.layout import replicated
from meshwright.dsl.statements import Stages, Zero
from meshwright.passes.statements.blocks.stored import split_further
from meshwright.passes.statements.draft import Draft, Pin
from meshwright.passes.statements.targets import of_parameters


def zero(draft: Draft) -> Draft:
    """Store every parameter under a `zero` statement split over the statement's axes."""
    if not draft.plan.of(Zero):
        return draft
    parameters = {n.args[1]: n for n in draft.graph.inputs if n.args[0] == "parameter"}
    for name, statement in of_parameters(draft, Zero, _kept).items():
        # What is not trained has no gradient and no state: only level 3 has something to split.
        trained = draft.captured.parameters[name].requires_grad
        if name in parameters and (trained or statement.level == 3):
            draft = _split(draft, parameters[name], statement)
    return draft


def _kept(statement: Zero) -> tuple[object, ...]:
    """How a statement has a tensor stored, and when it is sent."""
    return statement.level, statement.over, statement.every


def _split(draft: Draft, node: Node, statement: Zero) -> Draft:
    name, shape = node.args[1], node.tensor.shape
    pin = draft.inputs.get(name)
    used = pin.layout if pin else replicated(shape)
    stored = draft.stored[name].layout.split_axes if name in draft.stored else ()
    over = (*stored, *statement.over)
    over = tuple(axis for axis in dict.fromkeys(over) if axis not in used.split_axes)
    if draft.mesh.size(over) == 1 or not shape:
        return draft
    layout = split_further(used, over, draft.mesh)
    once = statement.when(pipelined=bool(draft.plan.of(Stages))) == "every=step"
    return replace(
        draft,
        stored={**draft.stored, name: Pin(layout, (statement,))},
        zero={**draft.zero, name: 1 if once else statement.level},
    )

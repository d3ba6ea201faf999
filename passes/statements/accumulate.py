"""Run a step in microbatches, one after the other, and add up their gradients.

Before:  mesh dp=2
         x: f32[8@dp, 16]      = input(argument x)
         linear: f32[8@dp, 64] = linear(x, vary, vary_1)
After:   mesh dp=2, micro=4 (sequential)
         x: f32[8@dp, 16]               = input(argument x)
         slice: f32[8@(dp, micro), 16]  = slice(x, micro)
         linear: f32[8@(dp, micro), 64] = linear(slice, vary, vary_1)

Microbatches are the coordinates of one more axis of the mesh, which is sequential: the inputs under
`data` are split over it, and all else follows. A gradient is partial over it by the `vary` rule, so
its sum over the axis is accumulation; a mean over the batch is a sum and a count, so microbatches
with few labels count for as much as they have. Evaluation runs the whole batch at once.
Requires: nothing. Ensures: a mesh with the axis, in training.
Elsewhere: loops that users write around `backward`, DeepSpeed's gradient_accumulation_steps.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.compiler.layout.mesh import Mesh
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Accumulate, Data, Stages
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.targets import inputs_of

AXIS = "micro"


def accumulate(draft: Draft) -> Draft:
    """`draft` on a mesh with an axis of microbatches, where the plan cuts the batch."""
    found = microbatches(draft.plan)
    if found is None or draft.captured.mode != "train":
        return draft
    statement, count = found
    if not draft.plan.of(Data):
        named = "accumulate" if isinstance(statement, Accumulate) else "microbatches="
        raise draft.plan.error(
            "P501",
            f"`{named}` has no input to cut into microbatches",
            [statement.at("microbatches")],
            help=f"write `data {', '.join(inputs_of(draft))}`, with the inputs that have a batch",
        )
    if count == 1:
        return draft
    axis = AXIS
    while axis in draft.mesh.names:
        axis += "_"
    mesh = Mesh((*draft.mesh.axes, (axis, count)), frozenset({axis}))
    return replace(draft, mesh=mesh, graph=replace(draft.graph, mesh=mesh))


def microbatches(plan: Plan) -> tuple[Accumulate | Stages, int] | None:
    """The statement that cuts the batch, and into how many microbatches."""
    for accumulate in plan.of(Accumulate):
        return accumulate, accumulate.count
    for stages in plan.of(Stages):
        if stages.microbatches is not None:
            return stages, stages.microbatches
    return None

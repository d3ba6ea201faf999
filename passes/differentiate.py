"""Write the backward of the loss behind the forward, where there is anything to train.

Before:  linear: f32[8, 64@tp] = linear(vary, up_weight)
         relu: f32[8, 64@tp]   = relu(linear)
After:   linear: f32[8, 64@tp]             = linear(vary, up_weight)
         relu: f32[8, 64@tp]               = relu(linear)
         threshold_backward: f32[8, 64@tp] = threshold_backward(matmul, relu, 0)

Requires: a placed graph. Ensures: one `gradient:` output for each parameter that the loss depends
on, in the dual of the parameter's layout.
Elsewhere: AOTAutograd's joint graph.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.compiler.autodiff.differentiate import differentiate as joint_graph
from meshwright.compiler.graph.ir import OutputKind
from meshwright.dsl.statements import Precision
from meshwright.passes.statements.draft import Draft, device_type, pinned_inputs


def differentiate(draft: Draft) -> Draft:
    """`draft` with the graph of forward and backward, in training; the forward alone otherwise."""
    losses = draft.graph.outputs_of(OutputKind.LOSS)
    if draft.captured.mode != "train" or not any(loss.node.requires_grad for loss in losses):
        return draft
    scaled = any(statement.dtype == "fp16" for statement in draft.plan.of(Precision))
    written = pinned_inputs(draft, draft.graph)
    device = device_type(draft)
    graph, moved = joint_graph(draft.graph, written, scaled=scaled, device=device)
    return replace(draft, graph=graph, movements=(*draft.movements, *moved))

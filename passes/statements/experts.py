"""Split the experts of mixtures over ranks.

Before:  experts_up_weight: f32[4, 64, 16]    = input(parameter mlp.experts.up.weight)
After:   experts_up_weight: f32[4@ep, 64, 16] = input(parameter mlp.experts.up.weight)

Tokens follow: they come to the experts by one `all_to_all` and go back by another.
Requires: mixtures where the plan has `experts` with a `count`. Ensures: every parameter of their
experts is pinned.
Elsewhere: GShard's einsum with a sharded expert dim.
"""

from __future__ import annotations

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.factors import cut
from meshwright.dsl.statements import Experts
from meshwright.passes.experts.inside import inside
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.pins import pin, tensor_text
from meshwright.passes.statements.targets import modules_of


def experts(draft: Draft) -> Draft:
    """Pin the stacked parameters under every `experts` statement."""
    if not draft.plan.of(Experts):
        return draft
    for node, statement in inside(draft).parameters.items():
        draft = _pinned(draft, node, statement)
    resolved = draft.plan.resolve(Experts, modules_of(draft, Experts))
    inputs = [node for node in draft.graph.inputs if node.args[0] == "parameter"]
    for name in draft.mixtures:
        if name not in resolved:
            continue
        for node in inputs:
            if str(node.args[1]).startswith(f"{name}.experts."):
                draft = _pinned(draft, node, resolved[name])
    return draft


def _pinned(draft: Draft, node: Node, statement: Experts) -> Draft:
    _check_divides(draft, node, statement)
    return pin(draft, node, {0: cut(node.tensor.shape[0], *statement.over)}, statement)


def _check_divides(draft: Draft, node: Node, statement: Experts) -> None:
    """Raises `PlanError` where experts do not divide over the statement's axes."""
    count, ranks = node.tensor.shape[0], draft.mesh.size(statement.over)
    if count % ranks:
        raise draft.plan.error(
            "P203",
            f"cannot split {count} experts over {ranks} ranks",
            statement.at("count"),
            subject=tensor_text(node),
            help=f"write a `count` that {ranks} divides",
        )

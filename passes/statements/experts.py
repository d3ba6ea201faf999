"""Split experts over ranks.

Before:  experts_up_weight: f32[4, 64, 16]    = input(parameter mlp.experts.up.weight)
After:   experts_up_weight: f32[4@ep, 64, 16] = input(parameter mlp.experts.up.weight)

Tokens follow: those of mixtures by one `all_to_all` to the experts and another back, and those of
experts that a model has as `place_experts` says.
Requires: nothing. Ensures: what is stacked by expert under every `experts` statement is pinned.
Elsewhere: GShard's einsum with a sharded expert dim.
"""

from __future__ import annotations

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.factors import cut
from meshwright.dsl.errors import PlanError, either
from meshwright.dsl.statements import Experts
from meshwright.dsl.suggest import selectors_of
from meshwright.passes.experts.inside import inside, placing
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.pins import pin, tensor_text
from meshwright.passes.statements.targets import modules_of


def experts(draft: Draft) -> Draft:
    """Pin the stacked parameters under every `experts` statement."""
    if not draft.plan.of(Experts):
        return draft
    resolved = draft.plan.resolve(Experts, modules_of(draft, Experts))
    inputs = [node for node in draft.graph.inputs if node.args[0] == "parameter"]
    for name in draft.mixtures:
        if name not in resolved:
            continue
        for node in inputs:
            if str(node.args[1]).startswith(f"{name}.experts."):
                draft = _pinned(draft, node, resolved[name])
    return _of_model(draft)


def _of_model(draft: Draft) -> Draft:
    """Pin the stacked parameters that a model has."""
    found = inside(draft).parameters
    for module, statement in placing(draft).items():
        names = (str(node.args[1]) for node in found)
        has_any = any(name.startswith(f"{module}.") for name in names)
        if statement.count is None and not has_any and draft.variant_of is None:
            raise _no_experts(draft, module, statement)
    for node, statement in found.items():
        if statement.count is None:
            draft = _pinned(draft, node, statement)
    return draft


def _no_experts(draft: Draft, module: str, statement: Experts) -> PlanError:
    everywhere = {"": statement} if statement.count is None else {}
    found = inside(draft, everywhere).parameters
    modules = [str(node.args[1]).rpartition(".")[0] for node in found]
    shown = selectors_of(list(dict.fromkeys(modules)))[:3]
    such = f"name modules that have them, such as {either(shown)}, or " if shown else ""
    return draft.plan.error(
        "P501",
        f"`{module}` has no experts: no parameter in it has a matrix for each of many",
        statement,
        help=f"{such}write how many experts it is to become: `count=8`",
    )


def _pinned(draft: Draft, node: Node, statement: Experts) -> Draft:
    """`draft` with the first dim of a stacked parameter split.

    Raises `PlanError` where experts do not divide over the statement's axes.
    """
    count, ranks = node.tensor.shape[0], draft.mesh.size(statement.over)
    if count % ranks:
        given = statement.count is not None
        raise draft.plan.error(
            "P203",
            f"cannot split {count} experts over {ranks} ranks",
            statement.at("count" if given else "over"),
            subject=tensor_text(node),
            help=f"write a `count` that {ranks} divides"
            if given
            else f"use axes of which the size divides {count}",
        )
    return pin(draft, node, {0: cut(count, *statement.over)}, statement)

"""Lay out parameters, buffers, inputs and activations as `shard` statements and marks write.

Before:  up_weight: f32[64, 16] = input(parameter up.weight)
After:   up_weight: f32[64@tp, 16] = input(parameter up.weight)

A `shard` of a parameter takes the place of what `columns`, `rows`, `vocab` and `summa` said of it.
`-> LAYOUT` is a module's output, `<- LAYOUT` its input; `meshwright.layout(x, "...")` in a forward
marks one value.
Requires: names of tensors or modules. Ensures: what they and the marks name is pinned.
Elsewhere: JAX's with_sharding_constraint, DTensor's distribute_tensor.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.compiler.graph.annotate import LAYOUT
from meshwright.compiler.graph.ir import INPUT, Node, TensorType
from meshwright.compiler.layout.layout import Layout
from meshwright.dsl.errors import PlanError
from meshwright.dsl.layouts import LayoutTemplate
from meshwright.dsl.statements import Columns, Rows, Shard, Statement, Summa, Vocab
from meshwright.passes.statements.draft import Draft, Pin, input_key
from meshwright.passes.statements.pins import (
    contradiction,
    module_text,
    tensor_text,
    to_dim,
    with_pin,
)
from meshwright.passes.statements.targets import entered, evaluated, modules_of, tensors_of


def shard(draft: Draft) -> Draft:
    """Pin what every `shard` statement and every mark speaks of."""
    return _marks(_inputs(_outputs(_tensors(draft))))


def _tensors(draft: Draft) -> Draft:
    arguments = {n.args[1]: n for n in draft.graph.inputs if n.args[0] == "argument"}
    weights = {n.args[1]: n for n in draft.graph.inputs if n.of_model}
    nodes = {**arguments, **weights}
    done: dict[str, Shard] = {}
    for name, statement in draft.plan.resolve(Shard, tensors_of(draft), of="tensor").items():
        own = draft.captured.aliases.get(name, name)
        if own not in nodes:
            continue
        node = nodes[own]
        if own in arguments and own in weights:
            raise draft.plan.error(
                "P501",
                f"`{own}` names an input of the model and a {node.args[0]} too",
                statement,
                subject=tensor_text(node),
                help="rename that argument of `forward`",
            )
        key = input_key(node)
        layout = _layout(draft, statement.layout, node.tensor.shape, tensor_text(node, shape=False))
        if layout.partial and node.of_model:
            raise draft.plan.error(
                "P501",
                f"`{name}` cannot be stored as a pending sum: an optimizer would step each share",
                statement.at("layout"),
                subject=tensor_text(node),
                help="split it over the axis, or leave it whole",
            )
        if own in done and not draft.inputs[key].layout.equals(layout, draft.mesh):
            raise contradiction(draft, node, (done[own],), statement)
        draft = with_pin(draft, key, Pin(layout, (*_before(draft, key), statement)))
        done[own] = statement
    return draft


def _before(draft: Draft, name: str) -> tuple[Statement, ...]:
    """The statements that a `shard` refines."""
    pin = draft.inputs.get(name)
    statements = pin.statements if pin else ()
    return tuple(s for s in statements if isinstance(s, (Columns, Rows, Vocab, Summa)))


def _layout(draft: Draft, template: LayoutTemplate, shape: tuple[int, ...], what: str) -> Layout:
    dims = tuple(to_dim(dim) for dim in draft.plan.dims(template, shape, what))
    return Layout(dims, partial=tuple(sorted(template.partial)))


def _outputs(draft: Draft) -> Draft:
    resolved = draft.plan.resolve(Shard, modules_of(draft, Shard), of="output")
    results = _results(draft, set(resolved))
    values = dict(draft.values)
    for module, statement in resolved.items():
        node = results.get(module)
        if node is None and (draft.variant_of is not None or evaluated(draft, module)):
            continue
        if node is None:
            raise draft.plan.error(
                "P501",
                f"{module_text(module)} gives no tensor that is used outside of it",
                statement,
                help="name a module with one output that the model uses",
            )
        layout = _layout(draft, statement.layout, node.tensor.shape, f"output of {module}: ")
        values[node] = Pin(layout, (statement,))
    return replace(draft, values=values)


def _results(draft: Draft, modules: set[str]) -> dict[str, Node]:
    """By module: the last tensor computed inside and used outside."""
    found: dict[str, Node] = {}
    users = draft.graph.users()
    returned = draft.graph.returned
    for node in draft.graph.nodes:
        if not isinstance(node.type, TensorType) or node.op == INPUT:
            continue
        for module, _ in node.origin.modules:
            if module in modules and (
                node in returned
                or any(all(path != module for path, _ in u.origin.modules) for u in users[node])
            ):
                found[module] = node
    return found


def _inputs(draft: Draft) -> Draft:
    resolved = draft.plan.resolve(Shard, modules_of(draft, Shard), of="input")
    found = entered(draft.graph, resolved)
    entering = dict(draft.entering)
    for module, (node, value) in found.items():
        statement = resolved[module]
        layout = _layout(draft, statement.layout, value.tensor.shape, f"input of {module}: ")
        entering[node] = (*entering.get(node, ()), (value, Pin(layout, (statement,))))
    for module in resolved if draft.variant_of is None else ():
        if module in found or evaluated(draft, module):
            continue
        raise draft.plan.error(
            "P501",
            f"no tensor enters {module_text(module)}",
            resolved[module],
            help="name a module that takes a tensor",
        )
    return replace(draft, entering=entering)


def _marks(draft: Draft) -> Draft:
    """Pin the values marked by `meshwright.layout(x, "...")`."""
    values = dict(draft.values)
    for node in draft.graph.nodes:
        if node.op == LAYOUT:
            text = node.args[1]
            try:
                template = draft.plan.layout(text)
                layout = _layout(draft, template, node.tensor.shape, f"{node.origin.module}: ")
            except PlanError as error:
                raise error.about(f"marked at {node.origin.source}") from None
            values[node] = Pin(layout, ())
    return replace(draft, values=values)

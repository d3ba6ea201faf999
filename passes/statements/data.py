"""Split the batch of the inputs under `data`.

Before:  x: f32[8, 16] = input(argument x)
After:   x: f32[8@dp, 16] = input(argument x)

Gradients are reduced over the axis by the `vary` rule alone: a parameter that meets a split value
is varying, and its cotangent partial.
Requires: nothing. Ensures: each input with the batch's size is split or named in `shard`.
Elsewhere: DDP, DistributedSampler.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.factors import cut
from meshwright.dsl.errors import PlanError, plural
from meshwright.dsl.layouts import format_axes
from meshwright.dsl.statements import Data, Shard
from meshwright.passes.statements.accumulate import microbatches
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.pins import pin, tensor_text
from meshwright.passes.statements.targets import inputs_of


def data(draft: Draft) -> Draft:
    """Pin every input that a `data` statement names."""
    arguments = {n.args[1]: n for n in draft.graph.inputs if n.args[0] == "argument"}
    resolved = draft.plan.resolve(Data, inputs_of(draft))
    found = {name: each for name, each in resolved.items() if name in arguments}
    for name, statement in found.items():
        draft = _split(draft, arguments[name], statement)
    _check_complete(draft, arguments, found)
    return draft


def _split(draft: Draft, node: Node, statement: Data) -> Draft:
    shape = node.tensor.shape
    axes = (*statement.over, *sorted(draft.mesh.sequential))
    parts = draft.mesh.size(axes)
    if statement.dim >= len(shape):
        raise draft.plan.error(
            "P206",
            f"`{node.args[1]}` has no dim {statement.dim}",
            statement.at("dim"),
            subject=tensor_text(node),
            help=f"use a dim below {len(shape)}" if shape else "take it out of `data`",
        )
    size = shape[statement.dim]
    if size % parts:
        raise _uneven(draft, node, statement, size, parts)
    return pin(draft, node, {statement.dim: cut(size, *axes)}, statement)


def _uneven(draft: Draft, node: Node, statement: Data, size: int, parts: int) -> PlanError:
    """The error for a batch that the ranks and microbatches do not divide."""
    over = ", ".join(f"{axis}={draft.mesh.size(axis)}" for axis in statement.over)
    message = f"cannot split a batch of {size}" + (f" over {over}" if over else "")
    lower = size - size % parts or parts
    help = f"use a batch of {lower} or {lower + parts}"
    places = [statement.at("over")]
    found = microbatches(draft.plan) if draft.mesh.sequential else None
    if found is not None and found[1] > 1:
        cutting, count = found
        message += f" {'times' if over else 'into'} {plural(count, 'microbatch')}"
        places = [cutting.at("microbatches"), *(places if over else ())]
        each, left = divmod(size, parts // count)
        fit = [] if left else [n for n in range(1, each + 1) if each % n == 0]
        near = [*[n for n in fit if n < count][-1:], *[n for n in fit if n > count][:1]]
        if near:
            *less, last = near
            help += f", or {''.join(f'{n} or ' for n in less)}{plural(last, 'microbatch')}"
    return draft.plan.error("P203", message, places, subject=tensor_text(node), help=help)


def _check_complete(draft: Draft, arguments: Mapping[str, Node], found: Mapping[str, Data]) -> None:
    """Raises `PlanError` for an input with the batch's size that no statement names: it was more
    likely forgotten than left whole on purpose."""
    sizes = {arguments[name].tensor.shape[s.dim]: s for name, s in found.items()}
    sharded = {
        name
        for statement in draft.plan.of(Shard)
        for target in statement.targets
        for name in target.match(list(arguments))
    }
    missing = [
        name
        for name, node in arguments.items()
        if name not in found
        and name not in sharded
        and node.tensor.shape[:1]
        and node.tensor.shape[0] in sizes
    ]
    if missing:
        name, node = missing[0], arguments[missing[0]]
        statement = sizes[node.tensor.shape[0]]
        # A statement of another dim stays as it is, beside one of the first dim.
        names = missing if statement.dim else [*found, *missing]
        line = f"data {', '.join(names)} over {format_axes(statement.over)}"
        raise draft.plan.error(
            "P501",
            f"the input `{name}` has the batch's size and is not under `data`",
            statement,
            subject=tensor_text(node),
            help=f"write `{line}`, or `shard {', '.join(missing)} [...]` to keep it whole",
        )

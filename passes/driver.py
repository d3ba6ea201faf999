"""Compile: the list of passes, in order. Read it as the table of contents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from meshwright.compiler.autodiff.differentiate import differentiate
from meshwright.compiler.capture import capture
from meshwright.compiler.capture.arguments import check_arguments, target_device
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import Graph, OutputKind, TensorType
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.check import check
from meshwright.compiler.program import Step, Stored
from meshwright.compiler.public import Program
from meshwright.dsl.plan import Plan
from meshwright.passes.attribute import attribute
from meshwright.passes.bucket import bucket
from meshwright.passes.contracts.allow import check_replication
from meshwright.passes.contracts.expect import check_contracts
from meshwright.passes.contracts.idle import check_axes
from meshwright.passes.contracts.supported import check_supported
from meshwright.passes.hoist import hoist
from meshwright.passes.lower import lower
from meshwright.passes.overlap import overlap
from meshwright.passes.partition import partition
from meshwright.passes.rewriting.lookups import lookups
from meshwright.passes.rewriting.masks import masks
from meshwright.passes.rewriting.normalise import normalise
from meshwright.passes.rewriting.route import route
from meshwright.passes.split import split
from meshwright.passes.statements.columns import columns
from meshwright.passes.statements.data import data
from meshwright.passes.statements.draft import Draft, pinned_inputs
from meshwright.passes.statements.fragments import with_fragments
from meshwright.passes.statements.pad import pad
from meshwright.passes.statements.pad_sequences import pad_sequences
from meshwright.passes.statements.pins import pin_lines
from meshwright.passes.statements.rows import rows
from meshwright.passes.statements.sequence import gathers_again, sequence
from meshwright.passes.statements.shard import shard
from meshwright.passes.statements.vocab import vocab
from meshwright.passes.vary import vary

REWRITING: tuple[Callable[[Graph], Graph], ...] = (masks, lookups, normalise, route)
"""What every model is rewritten by, whatever its plan."""

PLACING: tuple[Callable[[Draft], Draft], ...] = (
    data,
    columns,
    rows,
    vocab,
    shard,
    pad,
    sequence,
    pad_sequences,
    partition,
    hoist,
)
"""Each carries out what the plan says of layouts; the last two place every node."""


def compile_program(
    model: nn.Module,
    plan: Plan,
    example: Any,
    *,
    loss: Any = None,
    outputs: Sequence[str] = (),
    static: Sequence[str] = (),
    mode: str = "train",
    device: str | torch.device | None = None,
    launcher: Callable[..., Any],
    variant_of: tuple[str, ...] | None = None,
) -> Program:
    """Compile `model` under `plan`; see `meshwright.compile`.

    `variant_of` are the inputs of the program that this is for another mode or other inputs of.
    """
    check_arguments(model, plan, loss, outputs, static, mode)
    target = target_device(device, default_device())
    asked = {"loss": loss, "outputs": tuple(outputs), "static": tuple(static), "device": target}
    again: Any = partial(compile_program, model, plan, **asked)
    plan = with_fragments(plan, model)
    check_supported(plan)
    draft = _drafted(model, plan, example, {**asked, "mode": mode}, variant_of)
    captured = draft.captured
    for each in PLACING:
        draft = each(draft)
        check(draft.graph, each.__name__)
    draft, step = _step(draft)
    check_replication(draft)
    program = Program(
        plan=plan,
        mesh=draft.mesh,
        captured=captured,
        step=step,
        parameters=_stored(draft, "parameter", captured.parameters),
        buffers=_stored(draft, "buffer", captured.buffers),
        movements=draft.movements,
        device=target,
        model=model,
        recompile=partial(again, launcher=launcher, variant_of=captured.input_names),
        launcher=launcher,
    )
    if variant_of is None:
        check_axes(program)
    check_contracts(program)
    return program


def _drafted(
    model: nn.Module,
    plan: Plan,
    example: Any,
    capturing: Mapping[str, Any],
    variant_of: tuple[str, ...] | None,
) -> Draft:
    """The model captured, before any pass."""
    mesh = Mesh(plan.mesh)
    captured = capture(model, example, mesh, **capturing)
    modules = {name: type(m).__name__ for name, m in model.named_modules() if name}
    graph = _rewritten(captured.graph)
    draft = Draft(plan, mesh, captured, graph, modules, variant_of=variant_of)
    return replace(draft, evaluation=cache(partial(_evaluation, model, example, mesh, capturing)))


def _evaluation(
    model: nn.Module, example: Any, mesh: Mesh, capturing: Mapping[str, Any]
) -> Graph | None:
    """The model in its eval mode, if it can be captured there."""
    try:
        captured = capture(model, example, mesh, **{**capturing, "mode": "eval"})
    except CaptureError:
        return None
    return _rewritten(captured.graph)


def _rewritten(graph: Graph) -> Graph:
    """What was captured, in the operators that are placed."""
    for each in REWRITING:
        graph = each(graph)
    return graph


def _step(draft: Draft) -> tuple[Draft, Step]:
    """The graphs that run: forward and backward in training, the forward alone otherwise."""
    if draft.captured.mode != "train" or not _trains(draft.graph):
        forward = attribute(_checked(lower, draft.graph), draft)
        forward = _checked(overlap, forward)
        return draft, Step(replace(forward, name="stage0.forward"))
    forward = _checked(vary, draft.graph)
    joint, moved = differentiate(forward, pinned_inputs(draft, forward))
    draft = replace(draft, movements=(*draft.movements, *moved))
    check(joint, "differentiate")
    joint = _checked(bucket, _checked(lower, joint))
    joint = attribute(joint, draft)
    forward, backward = split(joint, regather=lambda node: gathers_again(draft.regions, node))
    return draft, Step(_checked(overlap, forward), _checked(overlap, backward))


def _checked(each: Callable[[Graph], Graph], graph: Graph) -> Graph:
    """What a pass makes of a graph, checked."""
    graph = each(graph)
    check(graph, each.__name__)
    return graph


def _trains(graph: Graph) -> bool:
    return any(loss.node.requires_grad for loss in graph.outputs_of(OutputKind.LOSS))


def _stored(draft: Draft, kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
    """How ranks hold these tensors; those that the graph does not use are whole."""
    nodes = {n.args[1]: n for n in draft.graph.inputs if n.args[0] == kind}
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        node = nodes.get(name)
        shape = tuple(tensor.shape)
        layout: Layout = node.placed if node is not None else replicated(shape)
        padding = draft.paddings.get(name)
        type = TensorType(shape, tensor.dtype)
        line = pin_lines(draft.inputs.get(name))
        found[name] = Stored(name, type, layout, tensor.requires_grad, padding, line)
    return found


def default_device() -> str:
    """Where `launch` would run here."""
    return "cuda" if torch.cuda.is_available() else "cpu"

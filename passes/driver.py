"""Compile: the list of passes, in order. Read it as the table of contents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from meshwright.compiler.capture import capture as capturing
from meshwright.compiler.capture.arguments import check_arguments, target_device
from meshwright.compiler.capture.capture import Captured
from meshwright.compiler.capture.initialisation import Initialisation, capture_initialisation
from meshwright.compiler.capture.outputs import Mode
from meshwright.compiler.capture.tracing.patches import ALONE
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.garbage import uncollected
from meshwright.compiler.graph.ir import Builder, Graph, Node, TensorType, rewrite
from meshwright.compiler.layout.extents import padding_between
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.check import check_all
from meshwright.compiler.program import Kept, Stored, Update
from meshwright.compiler.public import Program, Runtime
from meshwright.compiler.report.memory import holding
from meshwright.compiler.report.memory.prediction import memories
from meshwright.compiler.schedules.links import graphs_of, links_of
from meshwright.compiler.schedules.moves import completed
from meshwright.compiler.schedules.serial import same_on_every_rank
from meshwright.compiler.schedules.tables import Table
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Checkpoint, Memory, Offload, Share, Stages
from meshwright.passes.attribute import attribute
from meshwright.passes.bucket import bucket
from meshwright.passes.budgets.joint import jointly
from meshwright.passes.budgets.recompute import budget
from meshwright.passes.contracts.allow import check_replication
from meshwright.passes.contracts.expect import check_contracts
from meshwright.passes.contracts.idle import check_axes
from meshwright.passes.contracts.supported import check_supported
from meshwright.passes.copies import copies
from meshwright.passes.deliver import deliver
from meshwright.passes.differentiate import differentiate
from meshwright.passes.experts.batch import batch
from meshwright.passes.experts.place import place_experts
from meshwright.passes.experts.replace import mixtures_of, with_mixtures
from meshwright.passes.fuse import fuse
from meshwright.passes.loops import loop, part_axes, sum_first
from meshwright.passes.lower import lower
from meshwright.passes.move_varies import move_varies
from meshwright.passes.partition import partition
from meshwright.passes.placing.bias import bias_apart
from meshwright.passes.rewriting.lookups import lookups
from meshwright.passes.rewriting.masks import masks
from meshwright.passes.rewriting.normalise import normalise
from meshwright.passes.rewriting.route import route
from meshwright.passes.schedule import pipeline_table
from meshwright.passes.separate import separate
from meshwright.passes.statements.accumulate import accumulate
from meshwright.passes.statements.balance import balance
from meshwright.passes.statements.blocks.siblings import siblings
from meshwright.passes.statements.blocks.summa import block_products, store_once, summa
from meshwright.passes.statements.checkpoint import checkpoint
from meshwright.passes.statements.columns import columns
from meshwright.passes.statements.data import data
from meshwright.passes.statements.draft import Draft, on_graph
from meshwright.passes.statements.experts import experts
from meshwright.passes.statements.fragments import with_fragments
from meshwright.passes.statements.offloading.activations import offload
from meshwright.passes.statements.offloading.parameters import keep_elsewhere, movable
from meshwright.passes.statements.padding.sequences import pad_sequences
from meshwright.passes.statements.padding.vocabularies import pad
from meshwright.passes.statements.pins import pin_lines
from meshwright.passes.statements.precision import precision
from meshwright.passes.statements.rows import rows
from meshwright.passes.statements.sequences.context import context
from meshwright.passes.statements.sequences.split import sequence
from meshwright.passes.statements.shard import shard
from meshwright.passes.statements.share import share
from meshwright.passes.statements.split_saved import split_saved
from meshwright.passes.statements.stages import stages
from meshwright.passes.statements.vocab import vocab
from meshwright.passes.statements.zero import zero
from meshwright.passes.widen import widen

REWRITING: tuple[Callable[[Graph], Graph], ...] = (batch, masks, lookups, normalise, route)
"""The passes over what is captured, the same for every plan: operators become those that rules,
adjoints and kernels are written for."""

PASSES: tuple[Callable[[Draft], Draft], ...] = (
    # Layers share parameters.
    share,
    # Values get the types in which the plan computes.
    precision,
    # The statements of the plan become layouts of inputs and values.
    accumulate,
    data,
    columns,
    rows,
    vocab,
    summa,
    shard,
    experts,
    store_once,
    zero,
    movable,
    # What does not divide is padded.
    pad,
    sequence,
    pad_sequences,
    # Attention over split sequences.
    context,
    block_products,
    place_experts,
    # What the backward computes again.
    checkpoint,
    # The stages of a pipeline.
    balance,
    stages,
    siblings,
    # Every node is placed, and every change of layout is a node.
    bias_apart,
    partition,
    move_varies,
    # The backward is written out; from here on there is one graph of both.
    differentiate,
    check_replication,
    on_graph(lower),
    on_graph(part_axes),
    sum_first,
    widen,
    bucket,
    attribute,
    on_graph(loop),
    copies,
    # Forward and backward are graphs of their own, in each stage.
    deliver,
    budget,
    separate,
    fuse,
    split_saved,
    # Parameters, their gradients, and what waits for the backward leave the device.
    keep_elsewhere,
    offload,
)
"""The passes that carry out a plan. The docstring of each says what it requires and ensures, and
shows a graph before and after it; `check` checks every graph after every pass."""


@dataclass(frozen=True)
class CapturedModel:
    """A model captured in one mode, for inputs like one example: any plan can be tried on it."""

    model: nn.Module
    captured: Captured
    device: torch.device
    example: Any = field(repr=False)
    recapture: Callable[..., CapturedModel] = field(repr=False)
    """Capture the model, or a copy of it, for another `example` or `mode`."""

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The qualified names of all modules of the model but the root."""
        return tuple(name for name, _ in self.model.named_modules() if name)

    def under(self, plan: Plan) -> tuple[CapturedModel, Plan]:
        """The model with the mixtures of experts that a plan wants, captured as this was, and the
        plan with what the classes of its modules carry."""
        whole = with_fragments(plan, self.model)
        model = with_mixtures(self.model, self.captured, whole)
        if model is self.model:
            return self, whole
        found = self.recapture(model, self.example, mode=self.captured.mode)
        return found, with_fragments(plan, model)

    @cached_property
    def evaluation(self) -> Graph | None:
        """The graph of the model's eval mode, if it can be captured there."""
        try:
            return self.recapture(self.model, self.example, mode="eval").captured.graph
        except CaptureError:
            return None


def compile_program(
    model: nn.Module,
    plan: Plan,
    example: Any,
    *,
    loss: Any = None,
    outputs: Sequence[str] = (),
    static: Sequence[str] = (),
    mode: Any = "train",
    device: str | torch.device | None = None,
    runtime: Runtime,
) -> Program:
    """Compile `model` under `plan`; see `meshwright.compile`."""
    check_arguments(model, plan, loss, outputs, static, mode)
    check_supported(with_fragments(plan, model))
    captured = capture(
        model, example, loss=loss, outputs=outputs, static=static, mode=mode, device=device
    )
    return compile_captured(captured, plan, runtime=runtime)


def capture(
    model: nn.Module,
    example: Any,
    *,
    loss: Any = None,
    outputs: Sequence[str] = (),
    static: Sequence[str] = (),
    mode: Mode = "train",
    device: str | torch.device | None = None,
) -> CapturedModel:
    """Capture `model` for inputs like `example`, to be compiled under as many plans as you like."""
    target = target_device(device, "cuda" if torch.cuda.is_available() else "cpu")
    options = {"loss": loss, "outputs": tuple(outputs), "static": tuple(static), "device": target}
    captured = capturing.capture(model, example, mode=mode, **options)
    graph = captured.graph
    for each in REWRITING:
        graph = each(graph)
    again = partial(capture, **options)
    return CapturedModel(model, replace(captured, graph=graph), target, example, again)


def initialisation(model: nn.Module, device: torch.device) -> Initialisation:
    """How a model without values initialises itself, with its random operators made ours.

    Raises `CaptureError` where that cannot be captured.
    """
    found = capture_initialisation(model, device)

    def whole(builder: Builder, node: Node, mapping: Mapping[Node, Node]) -> Node:
        if not isinstance(node.type, tuple):
            return builder.copy(node, mapping, layout=replicated(node.tensor.shape))
        layouts = tuple(replicated(each.shape) if each else None for each in node.type)
        return builder.copy(node, mapping, layout=layouts)

    return replace(found, graph=rewrite(normalise(found.graph), whole))


def compile_captured(
    source: CapturedModel,
    plan: Plan,
    *,
    runtime: Runtime,
    variant_of: tuple[str, ...] | None = None,
    held: Mapping[str, tuple[int, ...]] | None = None,
    kept: Mapping[str, Kept] | None = None,
    quick: bool = False,
    asked: Plan | None = None,
) -> Program:
    """Compile a captured model under `plan`; one capture serves any number of plans.

    For a variant of a program, for another mode or other inputs, `variant_of` are that program's
    inputs, `held` says which of its stages hold each tensor, and `kept` where. With `quick`, no
    time is spent on what the smallest budget would be. `asked` is the plan behind one in which
    something was chosen.
    Requires a plan that `check_supported` lets pass. Raises `PlanError` and `LayoutError` as
    `meshwright.compile`.
    """
    for memory in plan.of(Memory) if source.captured.mode != "train" else ():
        plan = plan.with_text(memory)
    source, whole = source.under(plan)
    if plan.of(Memory):
        return jointly(plan, partial(compile_captured, source, runtime=runtime, asked=plan))
    price = _Price(source, runtime)
    draft = _drafted(source, whole, variant_of)
    draft = replace(draft, held=held or {}, kept=kept or {}, price=price, quick=quick)
    draft = _passed(draft)
    inputs, recapture = source.captured.input_names, source.recapture
    holders, chosen = {**draft.holders, **draft.held}, _as_chosen(plan, draft.plan)
    kept_at = draft.kept  # a draft has the model

    def recompile(model: nn.Module, *, example: Any, mode: Mode) -> Program:
        again = recapture(model, example, mode=mode)
        return compile_captured(
            *(again, chosen), runtime=runtime, variant_of=inputs, held=holders, kept=kept_at
        )

    program = _program(draft, source, runtime, recompile, asked or plan)
    if variant_of is None:
        check_axes(program)
    check_contracts(program)
    return program


def _passed(draft: Draft) -> Draft:
    """The draft after every pass; its graphs are checked after each that changes them."""
    checked: set[Node] = set()
    with ALONE, uncollected():
        for each in PASSES:
            before = [(graph, graph.nodes) for graph in draft.graphs]
            draft = each(draft)
            if not _are_still(draft.graphs, before):
                check_all(draft.graphs, each.__name__, checked)
    return draft


def _are_still(graphs: Sequence[Graph], before: Sequence[tuple[Graph, tuple[Node, ...]]]) -> bool:
    """Whether graphs are those from before, with the nodes that these had."""
    return len(graphs) == len(before) and all(
        graph is own and graph.nodes is nodes
        for graph, (own, nodes) in zip(graphs, before, strict=True)
    )


def _delinked(
    asked: Plan,
    example: Any,
    recapture: Callable[..., CapturedModel],
    runtime: Runtime,
    program: Program,
    plan: Plan | None,
) -> Program:
    """The program of the model of `program` with layers that no longer share parameters, under
    `plan` or what was `asked` without `share`."""
    assert program.captured.apart is not None
    source = CapturedModel(
        program.model, program.captured.apart, program.device, example, recapture
    )
    plan = plan or asked.without(Share)
    check_supported(with_fragments(plan, source.model))
    return compile_captured(source, plan, runtime=runtime)


def _as_chosen(plan: Plan, carried_out: Plan) -> Plan:
    """`plan` with the stages, regions and offloading of the one that is carried out, so that they
    are chosen once."""
    chosen = (Stages, Checkpoint, Offload)
    found = (s for s in carried_out.statements if isinstance(s, chosen))
    others = (s for s in plan.statements if not isinstance(s, chosen))
    return replace(plan, statements=(*others, *found))


class _Price:
    """What ranks need to hold, by their place along the pipeline, under drafts that differ in what
    is computed again or kept elsewhere alone."""

    def __init__(self, source: CapturedModel, runtime: Runtime) -> None:
        self.source, self.runtime = source, runtime
        self.updates: dict[frozenset[tuple[str, Kept]], Mapping[int, Update]] = {}
        """What updates take, by where parameters are kept."""

    def __call__(self, draft: Draft) -> dict[int, holding.Memory]:
        for each in () if draft.stages else PASSES[PASSES.index(separate) :]:
            draft = each(draft)
        program = _program(draft, self.source, self.runtime, self._recompile)
        kept = frozenset(draft.kept.items())
        if kept not in self.updates:
            self.updates[kept] = program.updates
        by_name, mesh = memories(program, self.updates[kept]), program.mesh
        found: dict[int, holding.Memory] = {}
        for rank in program.different_ranks:
            place = mesh.position(mesh.coords(rank), program.pipeline)
            own = by_name[program.place(rank)]
            if place not in found or own.peak > found[place].peak:
                found[place] = own
        return found

    def _recompile(self, *_: object, **__: object) -> Program:
        raise NotImplementedError("only what it holds is asked for")


def _drafted(source: CapturedModel, plan: Plan, variant_of: tuple[str, ...] | None) -> Draft:
    """The program before any pass; what its plan says twice, it says once."""
    plan = replace(plan, statements=tuple(dict.fromkeys(plan.statements)))
    mesh = Mesh(plan.mesh)
    return Draft(
        plan,
        mesh,
        source.captured,
        replace(source.captured.graph, mesh=mesh),
        source.modules,
        mixtures=mixtures_of(source.model),
        device=source.device,
        variant_of=variant_of,
        evaluation=lambda: source.evaluation,
    )


def _program(
    draft: Draft,
    source: CapturedModel,
    runtime: Runtime,
    recompile: Callable[..., Program],
    asked: Plan | None = None,
) -> Program:
    """The program that the last pass leaves; `asked` is the plan as it was given."""
    captured, table = draft.captured, pipeline_table(draft)
    return Program(
        plan=draft.plan,
        mesh=draft.mesh.of_ranks,
        captured=captured,
        stages=draft.stages,
        table=same_on_every_rank(draft.stages, draft.mesh)
        if table is None
        else completed(table, graphs_of(draft.stages), links_of(draft.stages)),
        parameters=_stored(draft, "parameter", captured.parameters, table),
        buffers=_stored(draft, "buffer", captured.buffers, table),
        movements=draft.movements,
        shared=draft.shared,
        balance=draft.balance,
        budgeted=draft.budgeted,
        notes=draft.notes,
        device=source.device,
        model=source.model,
        recompile=recompile,
        compile_delinked=partial(_delinked, asked, source.example, source.recapture, runtime)
        if draft.shared and asked is not None
        else None,
        initialise=partial(initialisation, device=source.device),
        runtime=runtime,
        updated=runtime.updated,
    )


def _held_at(draft: Draft, name: str, table: Table | None) -> dict[str, tuple[int, ...]]:
    """The coordinates whose ranks hold a tensor, by axis; nothing where all of them do."""
    stages = {**draft.holders, **draft.held}.get(name)
    if table is None or stages is None:
        return {}
    statement = draft.plan.of(Stages)[0]
    found = sorted({place for stage in stages for place in table.holders[stage]})
    if len(statement.over) == 1:
        return {statement.over[0]: tuple(found)} if len(found) < len(table.rows) else {}
    if len(found) > 1:
        return {}
    pipeline = Mesh(tuple((axis, draft.mesh.size(axis)) for axis in statement.over))
    return {axis: (place,) for axis, place in pipeline.coords(found[0]).items()}


def _stored(
    draft: Draft, kind: str, tensors: Mapping[str, torch.Tensor], table: Table | None
) -> dict[str, Stored]:
    """The tensors as ranks hold them; those that the graph does not use are whole."""
    nodes = {n.args[1]: n for n in draft.graph.inputs if n.args[0] == kind}
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        node = nodes.get(name)
        shape = tuple(tensor.shape)
        layout: Layout = node.placed if node is not None else replicated(shape)
        pins = [pin for pin in (draft.inputs.get(name), draft.stored.get(name)) if pin]
        # As captured, as operators use it, and as it is stored: each may be longer.
        layouts = [replicated(shape), *(pin.layout for pin in pins)]
        used = layouts[1] if name in draft.inputs else layouts[0]
        steps = (padding_between(*pair, draft.mesh) for pair in itertools.pairwise(layouts))
        found[name] = Stored(
            name,
            TensorType(shape, tensor.dtype if node is None else node.tensor.dtype),
            layout,
            used.canonical(draft.mesh) if name in draft.stored else layout,
            tensor.requires_grad,
            tuple(filter(None, steps)) if node is not None else (),
            ", ".join(filter(None, map(pin_lines, pins))),
            _held_at(draft, name, table),
            draft.kept.get(name, Kept()),
        )
    return found

"""Walk instructions with the storages of one rank: how many bytes are alive, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.codegen.instructions import (
    Allocate,
    Arrive,
    BucketView,
    Call,
    Copy,
    Exchange,
    Free,
    Instruction,
    Instructions,
    Item,
    Move,
    Operand,
    Pause,
    Rearrange,
    Return,
    Save,
    Start,
    Take,
    UnderWay,
    Variable,
    Wait,
)
from meshwright.compiler.codegen.linking import RandomState, RankContext
from meshwright.compiler.graph.aliasing import is_allocated
from meshwright.compiler.graph.ir import (
    RETURNED,
    TO_DISK,
    TO_HOST,
    Graph,
    MeshOp,
    Node,
    Op,
    OutputKind,
)
from meshwright.compiler.layout.local_ops import LocalOp, apply_all
from meshwright.compiler.report.memory.calls import Calling, Calls, function_key
from meshwright.compiler.report.memory.saved import Saved
from meshwright.compiler.report.memory.tally import Tally
from meshwright.compiler.report.memory.tensors import (
    Held,
    Local,
    Storage,
    Use,
    contiguous,
    fresh,
    leaves,
    moved,
)
from meshwright.compiler.report.memory.uses import uses
from meshwright.compiler.schedules.actions import Action
from meshwright.compiler.schedules.transfers import PassedKey
from meshwright.compiler.stages import PASSED_AS, Stage

_PLACES: dict[Op, str] = {TO_HOST: "host", TO_DISK: "disk"}
"""Where values are brought; others come to the device."""


@dataclass(slots=True)
class _Running:
    """A graph that is walked, what its action takes from and adds to, and its variables."""

    graph: Graph
    action: Action
    context: RankContext
    saved: dict[int, Held]
    buckets: dict[str, Node] = field(init=False)
    values: dict[Variable, Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = (node for node in self.graph.nodes if node.op == MeshOp("bucket"))
        self.buckets = {node.name: node for node in found}


class Walk:
    """The storages of one rank through the actions of a step, one after another, given how many
    other ranks take each value that it sends, and which values it hands over to itself.

    `tally` has the bytes, `most_saved` the most that is saved for later graphs, `saved` what one
    run of each graph saves, by node, and `allocated` the buckets that have no memory before the
    step. Of a call that cannot run on fake tensors only the results count. What outlives the step
    does not count: parameters, buffers, constants, the batch, what calls keep (`kept`), and
    gradients but for those of allocated buckets.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        coords: Mapping[str, int],
        device: torch.device,
        leaving: Counter[PassedKey],
        staying: Collection[PassedKey],
    ) -> None:
        self.coords, self.device = coords, device
        self._mesh = stages[0].forward.mesh
        self.tally, self.most_saved = Tally(), 0
        self.saved_at_most: tuple[Storage, ...] = ()
        """The memory of what is saved where that is most."""
        self.saved: dict[Node, int] = {}
        self.allocated: dict[tuple[int, str], Storage] = {}
        self._leaving_buckets: dict[tuple[int, str], Local] = {}
        """Those whose gradients leave the device."""
        self._stages = [Saved(stage) for stage in stages]
        self._num_takers, self._staying = leaving, staying
        self._passed: dict[PassedKey, Held] = {}
        """What stages have left for others, or begun to receive."""
        self._leaving: dict[PassedKey, list[Held]] = {}
        self._sent: dict[int, list[Held]] = {}
        """By place of the send: what is not known to have arrived."""
        self._results: list[Held] = []
        """What the step returns."""
        self._answer: Held = None
        self._outside = Storage(0)
        self._uses: dict[int, dict[Node, Use]] = {}
        self._calls = Calls(device)

    def run(self, graph: Graph, instructions: Instructions, action: Action) -> Iterator[None]:
        """Walk one graph, with what earlier actions have left for it; others may be walked at each
        pause."""
        stage = self._stages[action.stage]
        turn = graph.mesh.turns[0 if action.kind.once else action.microbatch]
        context = RankContext(graph.mesh, {**self.coords, **turn}, self.device, RandomState(), {})
        running = self._running = _Running(graph, action, context, stage.of(action))
        self.tally.entry = action
        for bucket in stage.buckets(action):
            self._allocate(bucket)
        self.tally.hold(tuple(stage.give_totals(action)))
        for variable, node in instructions.inputs.items():
            self._input(variable, node)
        for each in instructions.body:
            if isinstance(each, Pause):
                yield
                self._running, self.tally.entry = running, action
            else:
                self.tally.node = getattr(each, "node", None)
                self._instruction(each)
                self.tally.mark()
        self.tally.node = None
        for held in running.values.values():
            self.tally.release(held)
        before, after = stage.hand_over(action)
        self.tally.hold(after)
        self.tally.release(before)
        self._count_saved()
        self.tally.mark()

    def end(self) -> None:
        """Let go of what a step does not return."""
        left = {local.storage for held in self._results for local in leaves(held)}
        self.tally.end(left.union(self.allocated.values()))

    @property
    def kept(self) -> int:
        """The bytes that calls make in the first step and keep for later ones."""
        return self._calls.kept

    def send(self, place: int, values: Iterable[Node], microbatch: int) -> None:
        """Begin to send what another rank takes, given the inputs there; `arrived` lets go of it,
        by its place in the schedule."""
        sent = self._sent[place] = []
        for node in values:
            sent.append(self._come(self._leaving[*node.args, microbatch].pop()))
            self._answered(None)
        self.tally.mark()

    def arrived(self, place: int) -> None:
        """Let go of what has been sent, and is known to have arrived."""
        for value in self._sent.pop(place):
            self._answered(value)
            self.tally.release(value)
        self.tally.mark()

    def receive(self, values: Iterable[Node], microbatch: int) -> None:
        """Begin to receive what these inputs take."""
        for node in values:
            shape = node.placed.local_shape(self._mesh)
            local = fresh(shape, node.tensor.dtype, node, Use.COMMUNICATION)
            # Under way: nothing is lent for it.
            self._passed[(*node.args, microbatch)] = (None, local)
            self.tally.hold(local)
            self._answered(None)
        self.tally.mark()

    def _come(self, value: Held) -> Held:
        """What has been left for a graph or a send, once it has come; held from here on."""
        if not isinstance(value, tuple):
            return value
        self.tally.hold(value[1])
        self.tally.release(value)
        self.tally.serve(value[1], Use.VALUES)
        self._answered(value[1])
        return value[1]  # type: ignore[no-any-return]

    def _input(self, variable: Variable, node: Node) -> None:
        if node.held:
            self._running.values[variable] = self._whole(node)
        else:
            received = self._come(self._passed.pop((*node.args, self._running.action.microbatch)))
            self._bind(variable, received)
            self.tally.release(received)

    def _instruction(self, each: Instruction) -> None:
        match each:
            case Take(target, number):
                taken: Held = self._running.saved.pop(number)
                self._bind(target, taken)
                self.tally.release(taken)
            case Item(target, source, index):
                held = self._held(source)
                assert isinstance(held, tuple)
                self._bind(target, held[index])
            case Call():
                self._call(each)
            case Copy():
                pass
            case Allocate(node):
                self._allocate(node)
            case Rearrange(target, source, steps):
                self._bind(target, self._rearranged(source, steps, each.node))
            case Exchange():
                under_way = self._exchanged(each)
                self._bind(each.target, under_way[1])
                self.tally.release(under_way)
                self._arrived(each, under_way[1])
            case Start(handle, exchange):
                under_way = self._exchanged(exchange)
                self._bind(handle, under_way)
                self.tally.release(under_way)
            case Wait(handle, exchange):
                lent = self._running.values[handle]
                assert isinstance(lent, tuple)
                self._bind(exchange.target, lent[1])
                self._bind(handle, None)
                self._arrived(exchange, lent[1])
            case Move(handle, source, node):
                self._bind(handle, self._moved(source, node))
            case Arrive(target, handle, node):
                assert isinstance(handle, Variable)
                self._bind(target, self._came(self._held(handle), node))
                self._bind(handle, None)
            case Free(variables):
                for variable in variables:
                    self.tally.release(self._running.values.pop(variable))
            case Save(values):
                self._save({number: self._held(value) for number, value in values})
            case Return():
                self._return(each)

    def _moved(self, source: Operand, node: Node) -> tuple[Local, Local] | None:
        """What is moved, and where it goes; None for gradients, for which there is memory there."""
        if isinstance(source, BucketView):
            return None
        given = self._held(source)
        assert isinstance(given, Local)
        return given, moved(given, node, self._use(node), _PLACES.get(node.op, "device"))

    def _allocate(self, bucket: Node) -> None:
        """Note the memory of a bucket, which gradients keep beyond the step."""
        key = (self._running.action.stage, bucket.name)
        there = key in self.allocated or key in self._leaving_buckets
        if not there and is_allocated(bucket, self._running.graph.mesh):
            shape = bucket.placed.local_shape(self._running.graph.mesh)
            local = fresh(shape, bucket.tensor.dtype, bucket, Use.GRADIENTS)
            if bucket.kwargs.get("leaves"):
                self._leaving_buckets[key] = local
            else:
                self.allocated[key] = local.storage
            self.tally.hold(local)

    def _came(self, lent: tuple[Local, Local] | None, node: Node) -> Held:
        """What has come where it was moved to; gradients let go of their bucket on the device."""
        if lent is not None:
            return lent[1]
        while node.op != MeshOp("bucket"):
            node = node.args[0]
        self.tally.release(self._leaving_buckets[self._running.action.stage, node.name])
        return None

    def _answered(self, held: Held) -> None:
        """Note what the function was sent: its caller holds that until the next request."""
        self.tally.hold(held)
        self.tally.release(self._answer)
        self._answer = held

    def _arrived(self, exchange: Exchange, received: Held) -> None:
        """Note the result of an exchange, and let it go through its steps."""
        self.tally.serve(received, self._use(exchange.node))
        self._answered(received)
        if exchange.after:
            arranged = self._rearranged(exchange.target, exchange.after, exchange.node)
            self._bind(exchange.target, arranged)

    def _bind(self, variable: Variable, held: Held) -> None:
        self.tally.hold(held)
        self.tally.release(self._running.values.get(variable))
        self._running.values[variable] = held

    def _held(self, operand: Operand) -> Any:
        """An operand with what its variables hold in their place."""
        if isinstance(operand, Variable):
            return self._running.values[operand]
        if isinstance(operand, BucketView):
            bucket = self._running.buckets[operand.bucket]
            return self._whole(bucket if operand.index is None else bucket.args[operand.index])
        return tuple(map(self._held, operand)) if isinstance(operand, tuple) else operand

    def _whole(self, node: Node) -> Local:
        """A tensor that lies outside of what is counted."""
        shape = node.placed.local_shape(self._running.context.mesh)
        return Local(shape, contiguous(shape), node.tensor.dtype, self._outside)

    def _save(self, values: dict[int, Held]) -> None:
        outputs = {int(o.name): o.node for o in self._running.graph.outputs_of(OutputKind.SAVED)}
        seen = {self._outside}
        for number, held in values.items():
            new = {each.storage for each in leaves(held) if each.storage.place == "device"} - seen
            self.saved[outputs[number]] = sum(storage.num_bytes for storage in new)
            seen |= new
            self.tally.hold(held)
        self._running.saved.update(values)
        self._count_saved()

    def _count_saved(self) -> None:
        kept = {leaf.storage for stage in self._stages for leaf in leaves(stage.held())}
        here = [storage for storage in kept if storage.place == "device"]
        size = sum(storage.num_bytes for storage in here)
        if size > self.most_saved:
            self.most_saved, self.saved_at_most = size, tuple(here)

    def _return(self, returned: Return) -> None:
        """What is returned is kept to the end of the step, or until another stage takes it."""
        for output, result in zip(self._running.graph.results, returned.results, strict=True):
            held = self._held(result.handle if isinstance(result, UnderWay) else result)
            if output.kind in PASSED_AS:
                self._leave(
                    (PASSED_AS[output.kind], output.name, self._running.action.microbatch), held
                )
            else:
                self.tally.hold(held)
            if output.kind in RETURNED:
                self._results.append(held[1] if isinstance(held, tuple) else held)
        for reduction in returned.reductions:
            # Waited for after the last graph: until then it keeps what it was given.
            self.tally.hold(self._held(reduction.handle))

    def _leave(self, key: PassedKey, held: Held) -> None:
        """Keep a value for each rank that takes it."""
        times = self._num_takers[key] + (key in self._staying)
        if isinstance(held, tuple) and times > 1:
            held = held[1]
        self._leaving[key] = [held] * self._num_takers[key]
        if key in self._staying:
            self._passed[key] = held
        for _ in range(times):
            self.tally.hold(held)

    def _call(self, call: Call) -> None:
        args, kwargs = self._held(call.args), {k: self._held(v) for k, v in call.kwargs.items()}
        if call.out is not None:
            kwargs["out"] = self._held(call.out)
        calling = Calling(function_key(call), call.function.recipe, args, kwargs, call.node)
        found = self._called(calling, self._use(call.node))
        if call.target is not None:
            self._bind(call.target, found)

    def _rearranged(
        self, source: Operand, steps: tuple[LocalOp, ...], node: Node, *, sent: bool = False
    ) -> Held:
        held: Held = self._held(source)
        if steps:
            use = Use.COMMUNICATION if sent else self._use(node)
            held = self._called(Calling(steps, partial(_rearranger, steps), (held,), {}, node), use)
        return held

    def _use(self, node: Node) -> Use:
        """What the value of a node is for."""
        stage = self._running.action.stage
        if stage not in self._uses:
            self._uses[stage] = uses(self._stages[stage].stage)
        return self._uses[stage].get(node, Use.VALUES)

    def _exchanged(self, exchange: Exchange) -> tuple[Held, Held]:
        """The operand of an exchange, and its result in memory of its own unless it is donated;
        both are held from here on."""
        given = self._rearranged(exchange.source, exchange.before, exchange.node, sent=True)
        self.tally.hold(given)
        # What was sent is gone when a request arrives, before there is memory for its result.
        self._answered(None)
        received = self._received(given, exchange)
        self.tally.hold(received)
        return given, received

    def _received(self, given: Held, exchange: Exchange) -> Local:
        assert isinstance(given, Local)
        if exchange.donate and exchange.wire.kind == "all_reduce":
            return given
        shape = given.shape
        if exchange.wire.kind == "all_gather":
            shape = (self._running.context.mesh.size(exchange.wire.axes), *shape)
        elif exchange.wire.kind == "reduce_scatter":
            shape = shape[1:]
        elif exchange.counts:
            shape = exchange.node.placed.local_shape(self._running.context.mesh)
        return fresh(shape, given.dtype, exchange.node, Use.COMMUNICATION)

    def _called(self, call: Calling, use: Use) -> Any:
        """The results of a call, whose own storages count towards the peak."""
        cost = self._calls.cost(call, self._running.context, self._running.action.microbatch)
        self.tally.reach(cost.peak)
        if cost.first:
            self.tally.reach_first(cost.first)
        return cost.made(call, use)


def _rearranger(steps: tuple[LocalOp, ...], context: RankContext) -> Callable[[Tensor], Tensor]:
    return lambda tensor: apply_all(steps, tensor, context.coords, context.mesh)

"""Walk instructions with the storages of one rank: how many bytes are alive, and when.

Each call is run on fake tensors of its shapes, strides and types, so that views, copies and what
the operator needs inside itself are what they will be; equal calls are run once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from meshwright.compiler.codegen.instructions import (
    Allocate,
    BucketView,
    Call,
    Constant,
    Copy,
    Exchange,
    Free,
    Instruction,
    Instructions,
    Item,
    Operand,
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
from meshwright.compiler.graph.ir import Graph, MeshOp, Node, OutputKind
from meshwright.compiler.graph.types import Fakes
from meshwright.compiler.layout.local_ops import LocalOp, apply_all
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.report.counter import StorageCounter, address
from meshwright.compiler.report.tensors import Held, Local, Storage, contiguous, fresh, leaves
from meshwright.compiler.schedules.actions import Action
from meshwright.compiler.stages import PASSED_AS, Joined, Stage


@dataclass(frozen=True, slots=True)
class _Result:
    """A tensor that a call returns: its own memory of `num_bytes`, or that of an operand."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    memory: int
    """A number for each storage of its own; those of operands count down from -1."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Cost:
    """What a call returns, the most that its own storages hold while it runs, and what it keeps for
    later calls."""

    results: Any
    peak: int
    kept: int


class _Saved:
    """The values that graphs of a stage have saved for later ones, as the executor keeps them."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.mesh = stage, stage.forward.mesh
        self.turns = len(self.mesh.turns)
        self.by_microbatch: list[dict[int, Held]] = [{} for _ in range(self.turns)]
        # Without a loop, what runs once takes what the only turn has saved.
        self.once: dict[int, Held] = {} if self.turns > 1 else self.by_microbatch[0]
        self.joined = stage.joined

    def of(self, action: Action) -> dict[int, Held]:
        """What an action takes from, and adds to."""
        return self.once if action.kind.once else self.by_microbatch[action.microbatch]

    def give_totals(self, action: Action) -> list[Held]:
        """Hand an action the totals that it adds to. Returns what is held from here on, once for
        each place where it is."""
        held: list[Held] = []
        for number in self.stage.added(action.kind):
            if number not in self.once:
                value = self.joined[number].value
                local = fresh(value.placed.local_shape(self.mesh), value.tensor.dtype)
                outside = replace(local, storage=Storage(0))
                self.once[number] = local if self.joined[number].place is None else outside
                held.append(self.once[number])
            self.by_microbatch[action.microbatch][number] = self.once[number]
            held.append(self.once[number])
        return held

    def buckets(self, action: Action) -> list[Node]:
        """The buckets in which an action adds up gradients."""
        found = (self.joined[number].place for number in self.stage.added(action.kind))
        return [place[0] for place in found if place is not None]

    def held(self) -> tuple[Held, ...]:
        """All that is saved, once for each place where it is."""
        places = self.by_microbatch if self.turns == 1 else (self.once, *self.by_microbatch)
        return tuple(held for own in places for held in own.values())

    def hand_over(self, action: Action) -> tuple[Held, Held]:
        """Share what was made once, or join what one microbatch has made. Returns what was held
        before, and what is held after."""
        before = self.held()
        if action.kind.once:
            for each in self.by_microbatch:
                each.update(self.once)
            return before, self.held()
        own = self.by_microbatch[action.microbatch]
        for number in self.joined.keys() & own.keys():
            value = own.pop(number)
            if number not in self.once:
                assert isinstance(value, Local)
                self.once[number] = self._total(value, self.joined[number])
        return before, self.held()

    def _total(self, value: Local, joined: Joined) -> Local:
        """Where the values of all microbatches end; buckets lie outside of what is counted."""
        if joined.place is not None:
            return replace(value, stride=contiguous(value.shape), storage=Storage(0))
        shape = (self.turns, *value.shape) if joined.gathers else value.shape
        return fresh(shape, value.dtype)


class Walk:
    """The storages of one rank through the actions of a step, one after another.

    `peak` is the most bytes alive at once, `most_saved` the most that is saved for later graphs,
    `saved` what one run of each graph saves, by node, and `allocated` the buckets that have no
    memory before the step. Of a call that cannot run on fake tensors only the results count. What
    outlives the step does not count: parameters, buffers, constants, the batch, and gradients but
    for those of allocated buckets.
    """

    def __init__(
        self, stages: Sequence[Stage], coords: Mapping[str, int], device: torch.device
    ) -> None:
        self.coords, self.device = coords, device
        self._mesh = stages[0].forward.mesh
        self.alive = self.peak = self.most_saved = 0
        self.saved: dict[Node, int] = {}
        self.allocated: dict[tuple[int, str], Storage] = {}
        self._stages = [_Saved(stage) for stage in stages]
        self._passed: dict[tuple[Any, ...], Held] = {}
        """What stages have left for others, or begun to receive, by its kind there, name and
        microbatch."""
        self.leaving: Counter[tuple[Any, ...]] = Counter()
        """How many other ranks take a value."""
        self.staying: set[tuple[Any, ...]] = set()
        """The values that this rank hands over to itself."""
        self._leaving: dict[tuple[Any, ...], list[Held]] = {}
        self._sent: dict[int, list[Held]] = {}
        """By place of the send: what is not known to have arrived."""
        self._values: dict[Variable, Held] = {}
        self._answer: Held = None
        self._outside = Storage(0)
        self._costs: dict[Any, _Cost] = {}
        self._fakes = Fakes()

    def run(self, graph: Graph, instructions: Instructions, action: Action) -> None:
        """Walk one graph, with what earlier actions have left for it."""
        self._graph, self._action = graph, action
        stage, turns = self._stages[action.stage], graph.mesh.turns
        turn = turns[0 if action.kind.once else action.microbatch]
        coords = {**self.coords, **turn}
        self.context = RankContext(graph.mesh, coords, self.device, RandomState(), {})
        self._buckets = {node.name: node for node in graph.nodes if node.op == MeshOp("bucket")}
        self._own = stage.of(action)
        for bucket in stage.buckets(action):
            self._allocate(bucket)
        self._hold(tuple(stage.give_totals(action)))
        for variable, node in instructions.inputs.items():
            self._input(variable, node)
        for each in instructions.body:
            self._instruction(each)
        for held in self._values.values():
            self._release(held)
        self._values = {}
        before, after = stage.hand_over(action)
        self._hold(after)
        self._release(before)
        self._count_saved()

    def send(self, place: int, values: Iterable[Node], microbatch: int) -> None:
        """Begin to send what another rank takes, given the inputs there; `arrived` lets go of it,
        by its place in the schedule."""
        sent = self._sent[place] = []
        for node in values:
            sent.append(self._come(self._leaving[*node.args, microbatch].pop()))
            self._answered(None)

    def arrived(self, place: int) -> None:
        """Let go of what has been sent, and is known to have arrived."""
        for value in self._sent.pop(place):
            self._answered(value)
            self._release(value)

    def receive(self, values: Iterable[Node], microbatch: int) -> None:
        """Begin to receive what these inputs take."""
        for node in values:
            local = fresh(node.placed.local_shape(self._mesh), node.tensor.dtype)
            # Under way: nothing is lent for it.
            self._passed[(*node.args, microbatch)] = (None, local)
            self._hold(local)
            self._answered(None)

    def _come(self, value: Held) -> Held:
        """What has been left for a graph or a send, once it has come; held from here on."""
        if not isinstance(value, tuple):
            return value
        self._hold(value[1])
        self._release(value)
        self._answered(value[1])
        return value[1]  # type: ignore[no-any-return]

    def _input(self, variable: Variable, node: Node) -> None:
        if node.held:
            self._values[variable] = self._whole(node)
        else:
            received = self._come(self._passed.pop((*node.args, self._action.microbatch)))
            self._bind(variable, received)
            self._release(received)

    def _instruction(self, each: Instruction) -> None:
        match each:
            case Take(target, number):
                taken: Held = self._own.pop(number)
                self._bind(target, taken)
                self._release(taken)
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
                self._release(under_way)
                self._arrived(each, under_way[1])
            case Start(handle, exchange):
                under_way = self._exchanged(exchange)
                self._bind(handle, under_way)
                self._release(under_way)
            case Wait(handle, exchange):
                lent = self._values[handle]
                assert isinstance(lent, tuple)
                self._bind(exchange.target, lent[1])
                self._bind(handle, None)
                self._arrived(exchange, lent[1])
            case Free(variables):
                for variable in variables:
                    self._release(self._values.pop(variable))
            case Save(values):
                self._save({number: self._held(value) for number, value in values})
            case Return():
                self._return(each)

    def _allocate(self, bucket: Node) -> None:
        """Note the memory of a bucket, which gradients keep beyond the step."""
        key = (self._action.stage, bucket.name)
        if key not in self.allocated and is_allocated(bucket, self._graph.mesh):
            local = fresh(bucket.placed.local_shape(self._graph.mesh), bucket.tensor.dtype)
            self.allocated[key] = local.storage
            self._hold(local)

    def _answered(self, held: Held) -> None:
        """Note what the function was sent: its caller holds that until the next request."""
        self._hold(held)
        self._release(self._answer)
        self._answer = held

    def _arrived(self, exchange: Exchange, received: Held) -> None:
        """Note the result of an exchange, and let it go through its steps."""
        self._answered(received)
        if exchange.after:
            arranged = self._rearranged(exchange.target, exchange.after, exchange.node)
            self._bind(exchange.target, arranged)

    def _hold(self, held: Held) -> None:
        for local in leaves(held):
            local.storage.held += 1
            if local.storage.held == 1:
                self.alive += local.storage.num_bytes
        self.peak = max(self.peak, self.alive)

    def _release(self, held: Held) -> None:
        for local in leaves(held):
            local.storage.held -= 1
            if not local.storage.held:
                self.alive -= local.storage.num_bytes

    def _bind(self, variable: Variable, held: Held) -> None:
        self._hold(held)
        self._release(self._values.get(variable))
        self._values[variable] = held

    def _held(self, operand: Operand) -> Any:
        """An operand with what its variables hold in their place."""
        if isinstance(operand, Variable):
            return self._values[operand]
        if isinstance(operand, BucketView):
            bucket = self._buckets[operand.bucket]
            return self._whole(bucket if operand.index is None else bucket.args[operand.index])
        return tuple(map(self._held, operand)) if isinstance(operand, tuple) else operand

    def _whole(self, node: Node) -> Local:
        """A tensor that lies outside of what is counted."""
        shape = node.placed.local_shape(self.context.mesh)
        return Local(shape, contiguous(shape), node.tensor.dtype, self._outside)

    def _save(self, values: dict[int, Held]) -> None:
        outputs = {int(o.name): o.node for o in self._graph.outputs_of(OutputKind.SAVED)}
        seen = {self._outside}
        for number, held in values.items():
            new = {local.storage for local in leaves(held)} - seen
            self.saved[outputs[number]] = sum(storage.num_bytes for storage in new)
            seen |= new
            self._hold(held)
        self._own.update(values)
        self._count_saved()

    def _count_saved(self) -> None:
        kept = {leaf.storage for stage in self._stages for leaf in leaves(stage.held())}
        self.most_saved = max(self.most_saved, sum(storage.num_bytes for storage in kept))

    def _return(self, returned: Return) -> None:
        """What is returned is kept to the end of the step, or until another stage takes it."""
        for output, result in zip(self._graph.results, returned.results, strict=True):
            held = self._held(result.handle if isinstance(result, UnderWay) else result)
            if output.kind in PASSED_AS:
                self._leave((PASSED_AS[output.kind], output.name, self._action.microbatch), held)
            else:
                self._hold(held)
        for reduction in returned.reductions:
            # Waited for after the last graph: until then it keeps what it was given.
            self._hold(self._held(reduction.handle))

    def _leave(self, key: tuple[Any, ...], held: Held) -> None:
        """Keep a value for each rank that takes it."""
        if isinstance(held, tuple) and self.leaving[key] + (key in self.staying) > 1:
            held = held[1]
        self._leaving[key] = [held] * self.leaving[key]
        if key in self.staying:
            self._passed[key] = held
        for _ in range(self.leaving[key] + (key in self.staying)):
            self._hold(held)

    def _call(self, call: Call) -> None:
        args, kwargs = self._held(call.args), {k: self._held(v) for k, v in call.kwargs.items()}
        if call.out is not None:
            kwargs["out"] = self._held(call.out)
        key = (_function_key(call), _key(args), _key(tuple(kwargs.items())))
        found = self._costed(key, call.function.recipe, args, kwargs, call.node)
        if call.target is not None:
            self._bind(call.target, found)

    def _rearranged(self, source: Operand, steps: tuple[LocalOp, ...], node: Node) -> Held:
        held: Held = self._held(source)
        if steps:
            recipe = partial(_rearranger, steps)
            held = self._costed((steps, _key(held)), recipe, (held,), {}, node)
        return held

    def _exchanged(self, exchange: Exchange) -> tuple[Held, Held]:
        """The operand of an exchange, and its result in memory of its own unless it is donated;
        both are held from here on."""
        given = self._rearranged(exchange.source, exchange.before, exchange.node)
        self._hold(given)
        # What was sent is gone when a request arrives, before there is memory for its result.
        self._answered(None)
        received = self._received(given, exchange)
        self._hold(received)
        return given, received

    def _received(self, given: Held, exchange: Exchange) -> Local:
        assert isinstance(given, Local)
        if exchange.donate and exchange.wire.kind == "all_reduce":
            return given
        shape = given.shape
        if exchange.wire.kind == "all_gather":
            shape = (self.context.mesh.size(exchange.wire.axes), *shape)
        elif exchange.wire.kind == "reduce_scatter":
            shape = shape[1:]
        return fresh(shape, given.dtype)

    def _costed(
        self,
        key: Any,
        recipe: Callable[[RankContext], Callable[..., Any]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        node: Node,
    ) -> Any:
        """The results of a call, whose own storages count towards the peak."""
        turn = self._action.microbatch
        cost = self._costs.get((key, None)) or self._costs.get((key, turn))
        if cost is None:
            cost = self._measured(recipe, args, kwargs, node)
            # What the first call of a turn keeps, such as tables of random numbers, the others do
            # not make.
            again = self._measured(recipe, args, kwargs, node) if cost.kept else cost
            self._costs[key, turn if cost.kept else None] = again
        self.peak = max(self.peak, self.alive + cost.peak)
        self.alive += cost.kept
        own: dict[int, Storage] = {}
        operands = list(leaves((*args, *kwargs.values())))

        def made(result: Any) -> Any:
            if isinstance(result, tuple):
                return tuple(map(made, result))
            if result is None:
                return None
            if result.memory < 0:
                storage = operands[-1 - result.memory].storage
            else:
                storage = own.setdefault(result.memory, Storage(result.num_bytes))
            return Local(result.shape, result.stride, result.dtype, storage)

        return made(cost.results)

    def _measured(
        self,
        recipe: Callable[[RankContext], Callable[..., Any]],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        node: Node,
    ) -> _Cost:
        function, fakes, counter = recipe(self.context), [], StorageCounter()

        def given(operand: Any) -> Any:
            if isinstance(operand, tuple):
                return tuple(map(given, operand))
            if isinstance(operand, Constant):
                return operand.recipe(self.context)
            if isinstance(operand, Local):
                fakes.append(self._fake(operand))
                return fakes[-1]
            return operand

        positional, named = given(args), {key: given(value) for key, value in kwargs.items()}
        try:
            with torch.no_grad(), self._fakes, counter:
                found = function(*positional, **named)
        except RuntimeError:
            # Torch cannot run it without data, or without the device.
            return self._from_types(node)
        memory = {address(fake): -1 - i for i, fake in reversed(list(enumerate(fakes)))}

        def described(result: Any) -> Any:
            if isinstance(result, (tuple, list)):
                return tuple(map(described, result))
            if result is None:
                return None
            place = memory.setdefault(address(result), len(memory))
            size = result.untyped_storage().nbytes()
            return _Result(tuple(result.shape), result.stride(), result.dtype, place, size)

        results = described(found)
        returned = {address(result) for result in tree_leaves(found) if result is not None}
        size = sum(size for key, (_, size) in counter.made.items() if key in returned)
        return _Cost(results, counter.peak, counter.alive() - size)

    def _from_types(self, node: Node) -> _Cost:
        """The results of a node alone, each in memory of its own."""
        results: list[_Result | None] = []
        for i, (type, layout) in enumerate(node.results):
            if type is None or layout is None:
                results.append(None)
                continue
            shape = layout.local_shape(self.context.mesh)
            size = math.prod(shape) * type.dtype.itemsize
            results.append(_Result(shape, contiguous(shape), type.dtype, i, size))
        total = sum(result.num_bytes for result in results if result is not None)
        return _Cost(tuple(results) if isinstance(node.type, tuple) else results[0], total, 0)

    def _fake(self, local: Local) -> Tensor:
        with self._fakes:
            return torch.empty_strided(
                local.shape, local.stride, dtype=local.dtype, device=self.context.device
            )


def _key(operand: Any) -> Any:
    if isinstance(operand, tuple):
        return tuple(map(_key, operand))
    return operand.key if isinstance(operand, Local) else operand


def _function_key(call: Call) -> Any:
    """What equal calls have in common: a kernel's arguments and layouts, but not its number."""
    node = call.node
    known = composite_of(node.op)
    if known is None:
        return call.function.name
    args = tuple(
        None if isinstance(arg, Node) or i == known.number else arg
        for i, arg in enumerate(node.args)
    )
    return (node.op, repr(args), node.layout, tuple(n.layout for n in node.operands()))


def _rearranger(steps: tuple[LocalOp, ...], context: RankContext) -> Callable[[Tensor], Tensor]:
    return lambda tensor: apply_all(steps, tensor, context.coords, context.mesh)

"""One rank's walk through its schedule: each action runs the generated code of one graph.

What one action leaves for another is kept by microbatch: saved values for the later graphs of the
stage, activations and cotangents for the stage that takes them. What a stage of another rank takes
or makes is sent and received where the schedule says so, and awaited where an action takes it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.codegen.printing import Code, Pending, RankFunction
from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.aliasing import storage
from meshwright.compiler.graph.ir import (
    RETURNED,
    Graph,
    InputKind,
    Node,
    Output,
    OutputKind,
    Phase,
)
from meshwright.compiler.layout.layout import shard
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import COMBINE, Start, Wait, Wire
from meshwright.compiler.public import Program
from meshwright.compiler.schedules.actions import Action, Receive, Send, actions_of
from meshwright.compiler.schedules.transfers import PassedKey
from meshwright.compiler.stages import PASSED_AS, Joined, Stage
from meshwright.dsl.errors import MeshwrightError
from meshwright.runtime.buckets import Bucket, Kept, owners_of
from meshwright.runtime.checks.room import check_room, counted_exchanges
from meshwright.runtime.errors import operator_error
from meshwright.runtime.rank import RankProgram, RankState, Results

Snapshot = tuple[tuple[int, int, bool], dict[str, Tensor]]
"""Where a rank stands: its random numbers, and the buffers that a step changes."""
_GIVEN = (*RETURNED, OutputKind.BUFFER)


class Executor:
    """One program linked for one rank; `constants` are those of the model on its device, and
    `codes` the code of the graphs if it is not the program's own."""

    def __init__(
        self,
        program: Program,
        state: RankState,
        constants: Mapping[str, Tensor],
        codes: Sequence[Code] = (),
    ) -> None:
        self.state, self.constants = state, constants
        self.scaled = program.scaled
        self.entries = program.entries[state.rank]
        self.stored = {**program.parameters, **program.buffers}
        self._results: dict[tuple[OutputKind, str], Output] = {}
        places = {node.args[1]: i for i, node in enumerate(program.inputs())}
        named = {code.name: code for code in codes or program.code}
        graphs = {
            (action.stage, action.kind): program.stages[action.stage].graphs[action.kind]
            for action in actions_of(self.entries)
        }
        self.graphs = {
            (stage, phase): self._linked(graph, named[graph.name], places, stage, phase)
            for (stage, phase), graph in graphs.items()
        }
        self.taken = {i for each in self.graphs.values() for _, i in each.inputs.arguments}
        """The places of the arguments that the graphs of this rank use."""
        own = {stage for stage, _ in graphs}
        self.loops = {s.number: self._loop(s) for s in program.stages if s.number in own}
        self.turns = self._turns()
        self.counted = counted_exchanges(program)
        self.moves = self._moves(program)
        transfers = program.transfers
        self.leaving, self.staying = transfers.leaving(state.rank), transfers.staying(state.rank)
        self.settled, self.ends = transfers.settled(state.rank), transfers.ends(state.rank)
        returned = [o for graph in graphs.values() for o in graph.outputs_of(*_GIVEN)]
        given = [(o.kind, o.name) for o in program.captured.graph.outputs]
        order = {name: place for place, name in enumerate(given)}
        returned.sort(key=lambda o: (o.kind is not OutputKind.LOSS, order.get((o.kind, o.name), 0)))
        self.returned = dict.fromkeys(map(self._result, returned))
        """What a step returns, in order: the loss comes first."""
        self.buffers = [output for output in returned if output.kind is OutputKind.BUFFER]
        self._kept: dict[Bucket, Kept] = {}
        """What each bucket held before the step that is under way, if that has come to fill it."""

    def _linked(
        self, graph: Graph, code: Code, places: dict[str, int], stage: int, phase: Phase
    ) -> _Linked:
        state, turns = self.state, graph.mesh.turns
        run = [
            a.microbatch for a in actions_of(self.entries) if (a.stage, a.kind) == (stage, phase)
        ]
        filled = {
            name: (owners, state.flat_buffer(owners, node))
            for name, (owners, node) in owners_of(graph).items()
        }
        buffers = {name: buffer for name, (_, buffer) in filled.items()}
        outputs = list(enumerate(graph.results))
        contexts = [
            RankContext(
                graph.mesh,
                {**state.coords, **turn},
                state.device,
                state.random,
                buffers,
                state.loss_scale,
                first=microbatch == run[0],
                stores=state.stores,
                room=state.room,
            )
            for microbatch, turn in enumerate(turns[:1] if phase.once else turns)
        ]
        return _Linked(
            code,
            [code.link(context) for context in contexts],
            phase.once,
            _Inputs(graph, self, places),
            [(i, PASSED_AS[o.kind], o.name) for i, o in outputs if o.kind in PASSED_AS],
            [(i, self._result(o), storage(o.node).held) for i, o in outputs if o.kind in _GIVEN],
            {
                name: Bucket(buffer, [state.parameters[owner] for owner in owners])
                for name, (owners, buffer) in filled.items()
            },
        )

    def _result(self, output: Output) -> Output:
        """The first of equal results: of multiple stages, each gives the loss and the outputs."""
        return self._results.setdefault((output.kind, output.name), output)

    def _loop(self, stage: Stage) -> _Loop:
        """How values leave the loop of a stage."""
        joined, places = stage.joined, dict[int, tuple[Bucket, Tensor]]()
        for number, each in joined.items():
            if each.place is not None:
                node, index = each.place
                bucket = self.graphs[stage.number, each.phase].buckets[node.name]
                places[number] = bucket, bucket.buffer.views[index]
        return _Loop(
            stage.forward.mesh,
            self.state.device,
            joined,
            {phase: stage.added(phase) for phase in stage.graphs},
            {phase: stage.left_to_join(phase) for phase in stage.graphs},
            places,
        )

    def _turns(self) -> dict[Action, _Turn]:
        """What is known of each action before a step."""
        found: dict[Action, _Turn] = {}
        seen: set[Bucket] = set()
        for action in actions_of(self.entries):
            each, loop = self.graphs[action.stage, action.kind], self.loops[action.stage]
            places = [loop.places[n] for n in loop.added[action.kind] if n in loop.places]
            filled = dict.fromkeys((*each.buckets.values(), *(bucket for bucket, _ in places)))
            first = tuple(bucket for bucket in filled if bucket not in seen)
            seen.update(first)
            found[action] = _Turn(each, loop, action.kind, action.microbatch, first)
        return found

    def given(self, node: Node) -> Any:
        """What the code takes for a parameter, buffer or constant: the tensor, or what brings it to
        the device."""
        tensor, stored = self.tensor(node), self.state.stored.get(node.args)
        if stored is None or not stored.kept.value.away:
            return tensor
        return self.state.stores.resident(stored.kept.value, tensor)

    def tensor(self, node: Node) -> Tensor:
        """What this rank holds of a parameter, buffer or constant, in the layout of `node`."""
        state, (kind, name) = self.state, node.args
        if kind == "constant":
            return shard(self.constants[name], node.placed, state.mesh, state.coords)
        if (kind, name) not in state.tensors:
            raise PassError(
                f"rank {state.rank} does not hold `{name}`, and computes with it",
                help="report this: stages and what ranks hold do not fit together",
            )
        held, layout = state.tensors[kind, name], state.stored[kind, name].layout
        if layout.equals(node.placed, state.mesh):
            return held
        if not layout.split_axes:
            held = self.stored[name].padded(held)
        if layout.split_axes or held.shape != node.placed.shape:
            raise PassError(
                f"`{name}` is held as `{layout}`, and this program wants `{node.placed}`",
                help="report this: a program for other inputs placed a weight elsewhere",
            )
        return shard(held, node.placed, state.mesh, state.coords)

    def _moves(self, program: Program) -> dict[Send | Receive, list[_Move]]:
        """What this rank sends and receives, by the entry of its schedule."""
        mesh = program.stages[0].forward.mesh
        return {
            entry: [
                _Move(wire, node.args, node.placed.local_shape(mesh), node.tensor.dtype)
                for node, wire in program.transfers.wires(self.state.rank, entry)
            ]
            for entry in self.entries
            if not isinstance(entry, Action)
        }

    def run(self, arguments: Mapping[int, Tensor]) -> RankProgram:
        """One step: the entries of this rank in order, then what is still under way.

        `arguments` are the local parts of the inputs that are `taken`, by their place in the
        program's order. Returns `Results`, in memory that no later step writes to; gradients are in
        the flat buffers. The step counts once `commit` has been called; `undo` takes it back.
        """
        self._kept = {}
        self.state.room.needed.clear()
        self.state.follow_written()
        self.state.release_buffers()
        saved = {number: _Saved(loop) for number, loop in self.loops.items()}
        step = _Step(arguments, saved, self.returned.copy())
        begun: dict[int, RankProgram] = {}
        for place, entry in enumerate(self.entries):
            for earlier in self.ends.get(place, ()):
                yield from begun.pop(earlier)
            if isinstance(entry, Action) and entry.kind.once:
                begun[place] = self.act(entry, step)
                yield from _until_pause(begun[place])
            elif isinstance(entry, Action):
                yield from self.act(entry, step)
            elif isinstance(entry, Send):
                step.sent[place] = yield from self._send(entry, step.leaving)
            else:
                yield from self._receive(entry, step.passed)
            for arrived in self.settled.get(place, ()):
                yield from _all_arrived(step.sent.pop(arrived))
        for program in begun.values():
            yield from program
        for output, value in step.results.items():
            if type(value) is Pending:
                step.results[output] = yield from _arrived(value)
        yield from _all_arrived(step.reductions)
        for sent in step.sent.values():
            yield from _all_arrived(sent)
        yield from check_room(self.state, self.counted)
        return step.results

    def act(self, action: Action, step: _Step) -> RankProgram:
        """Run a graph: it takes what others have left for it, and leaves what others take."""
        turn, handed = self.turns[action], step.saved[action.stage]
        each, microbatch = turn.linked, turn.microbatch
        inputs = each.inputs.of(step.arguments)
        if each.inputs.received:
            yield from each.inputs.receive(inputs, step.passed, microbatch)
        for bucket in turn.fills:
            self._kept[bucket] = bucket.keep()
        own = handed.once if each.once else handed.by_microbatch[microbatch]
        own.update(handed.totals(turn.phase))
        values, under_way = yield from each.run(inputs, own, microbatch)
        if each.once:
            handed.share()
        else:
            for number in turn.loop.left_to_join[turn.phase]:
                handed.join(number, own.pop(number), microbatch)
        step.reductions += under_way
        for place, kind, name in each.sent:
            value, key = values[place], (kind, name, microbatch)
            if type(value) is Pending and self.leaving[key] + (key in self.staying) > 1:
                value = yield from _arrived(value)
            if key in self.staying:
                step.passed[key] = value
            step.leaving[key] = [value] * self.leaving[key]
        for place, output, lives_on in each.results:
            step.results[output] = values[place].clone() if lives_on else values[place]

    def _send(
        self, entry: Send, leaving: dict[PassedKey, list[Any]]
    ) -> Generator[Any, Any, list[Pending]]:
        """Begin to send what an action has left for another rank."""
        begun = []
        for move in self.moves[entry]:
            value = leaving[*move.key, entry.microbatch].pop()
            if type(value) is Pending:
                value = yield from _arrived(value)
            begun.append(Pending((yield Start(move.wire, move.checked(value)))))
        return begun

    def _receive(self, entry: Receive, passed: dict[PassedKey, Any]) -> RankProgram:
        """Begin to receive what an action takes, in memory that is freed with its last use: as many
        buffers as values are in flight."""
        for move in self.moves[entry]:
            buffer = torch.empty(move.shape, dtype=move.dtype, device=self.state.device)
            handle = yield Start(move.wire, buffer)
            passed[(*move.key, entry.microbatch)] = Pending(handle)

    def snapshot(self) -> Snapshot:
        """Where the rank stands before a step: its random numbers, and copies of the buffers that
        the step changes. What `restore` takes."""
        held = {each.name: self.state.tensors["buffer", each.name] for each in self.buffers}
        return self.state.random.place, {name: buffer.clone() for name, buffer in held.items()}

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to where the rank stood at `snapshot`."""
        random, buffers = snapshot
        self.state.random.restore(random)
        for name, value in buffers.items():
            self.state.tensors["buffer", name].copy_(value)

    def commit(self, results: Results) -> None:
        """Give the parameters their gradients, and take new values of buffers out of `results`."""
        kept, self._kept = self._kept, {}
        for bucket, gradients in kept.items():
            bucket.buffer.settle()
            if self.scaled:
                bucket.home.flat.mul_(1 / self.state.loss_scale.value)
            bucket.give(gradients)
        for output in self.buffers:
            self.state.tensors["buffer", output.name].copy_(results.pop(output))

    def undo(self) -> None:
        """Put back the gradients that an unfinished step has overwritten."""
        kept, self._kept = self._kept, {}
        for bucket, gradients in kept.items():
            bucket.put_back(gradients)


@dataclass(frozen=True, slots=True)
class _Move:
    """A value that is sent or received: its wire, what it is to the stage that takes it, and what
    each rank holds of it."""

    wire: Wire
    key: tuple[InputKind, str]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def checked(self, value: Tensor) -> Tensor:
        """`value` if it is what the other rank receives; Gloo would not notice that less comes."""
        if value.shape != self.shape or value.dtype != self.dtype:
            raise PassError(
                f"`{self.key[1]}` is {value.dtype} {list(value.shape)}, and received as "
                f"{self.dtype} {list(self.shape)}",
                help="report this: it is a bug",
            )
        return value


@dataclass(frozen=True, slots=True)
class _Turn:
    """An action: the graph of a phase of a stage, on one microbatch."""

    linked: _Linked
    loop: _Loop
    phase: Phase
    microbatch: int
    fills: tuple[Bucket, ...]
    """The buckets that no action before it has filled."""


@dataclass(slots=True)
class _Step:
    """What a step has computed so far; `saved` is by stage."""

    arguments: Mapping[int, Tensor]
    saved: Mapping[int, _Saved]
    results: dict[Output, Any]
    passed: dict[PassedKey, Any] = field(default_factory=dict)
    """What stages have made for those of this rank, or begun to send it."""
    leaving: dict[PassedKey, list[Any]] = field(default_factory=dict)
    """What is to be sent, as often as it is."""
    reductions: list[Pending] = field(default_factory=list)
    """What is under way into buckets."""
    sent: dict[int, list[Pending]] = field(default_factory=dict)
    """By place of the entry: what is not known to have arrived."""


@dataclass(frozen=True, slots=True)
class _Loop:
    """How a stage's values of all microbatches become one: `joined` as in `Stage`, in `added` the
    numbers of those that each graph adds up, in `left_to_join` of those that it leaves to be joined
    when it has run, and in `places` the part of a bucket in which a gradient is added up, by its
    number."""

    mesh: Mesh
    device: torch.device
    joined: Mapping[int, Joined]
    added: Mapping[Phase, tuple[int, ...]]
    left_to_join: Mapping[Phase, tuple[int, ...]]
    places: Mapping[int, tuple[Bucket, Tensor]]

    def total(self, number: int) -> Tensor:
        """Where values are added up, whatever it holds yet."""
        if number in self.places:
            bucket, place = self.places[number]
            bucket.buffer.allocate()
            return place
        value = self.joined[number].value
        shape = value.placed.local_shape(self.mesh)
        return torch.empty(shape, dtype=value.tensor.dtype, device=self.device)


class _Saved:
    """What the graphs of a stage have saved for later ones, by number."""

    def __init__(self, loop: _Loop) -> None:
        self.loop = loop
        self.by_microbatch: list[dict[int, Any]] = [{} for _ in loop.mesh.turns]
        # Without a loop, what runs once takes what the only turn has saved.
        self.once: dict[int, Any] = {} if len(self.by_microbatch) > 1 else self.by_microbatch[0]

    def totals(self, phase: Phase) -> Mapping[int, Tensor]:
        """What the graph of a phase adds to, by number; nothing else keeps it beyond its last
        use."""
        numbers = self.loop.added[phase]
        for number in numbers:
            if number not in self.once:
                self.once[number] = self.loop.total(number)
        return {number: self.once[number] for number in numbers}

    def share(self) -> None:
        """Let every microbatch have what was made once."""
        for own in self.by_microbatch:
            own.update(self.once)

    def join(self, number: int, value: Tensor, microbatch: int) -> None:
        """Join what a microbatch has saved for after the loop with that of the ones before."""
        joined, total = self.loop.joined[number], self.once.get(number)
        if joined.gathers:
            if total is None:
                total = self.once[number] = value.new_zeros((len(self.by_microbatch), *value.shape))
            total[microbatch].copy_(value)
        elif total is None:
            # The next one is combined in place, and other graphs may take what was saved.
            self.once[number] = value.clone()
        else:
            COMBINE[joined.value.placed.reduction](total, value, out=total)


def _until_pause(program: RankProgram) -> RankProgram:
    """Run a program until it pauses, or to its end."""
    with suppress(StopIteration):
        asked = [next(program)]
        while asked[0] is not None:
            # Nothing is left here of what has been sent, nor of what has come.
            asked.append(program.send((yield asked.pop())))


def _arrived(pending: Pending) -> Generator[Any, Any, Tensor]:
    """Wait for a value, and put it where it belongs."""
    value: Tensor = yield Wait(pending.handle)
    if pending.into is not None and value is not pending.into:
        pending.into.copy_(value)
    return value


def _all_arrived(pending: Iterable[Pending]) -> RankProgram:
    for each in pending:
        yield from _arrived(each)


@dataclass(frozen=True, slots=True)
class _Linked:
    """A graph with its code linked for this rank."""

    code: Code
    functions: list[RankFunction]
    """One for each microbatch, or a single one."""
    once: bool
    """Whether it runs once for all microbatches."""
    inputs: _Inputs
    sent: list[tuple[int, InputKind, str]]
    """What other stages take: its place among the values, what it is to them, and its name."""
    results: list[tuple[int, Output, bool]]
    """What the step returns: its place among the values, the output, and whether it lives on in a
    tensor that ranks hold, which may be written to."""
    buckets: dict[str, Bucket]

    def run(self, inputs: Sequence[Tensor], saved: dict[int, Any], microbatch: int) -> RankProgram:
        """Run the code; an operator that fails is named."""
        try:
            return (yield from self.functions[microbatch](inputs, saved))
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, (MeshwrightError, torch.OutOfMemoryError)):
                raise
            raise operator_error(error, self.code) from error


class _Inputs:
    """The values of a graph's inputs, of which all but the arguments and what other stages send are
    known beforehand.

    Weights that the graph does not use are left out: their layout there need not be the stored one.
    """

    def __init__(self, graph: Graph, executor: Executor, places: dict[str, int]) -> None:
        self.known: list[Any] = []
        self.arguments: list[tuple[int, int]] = []
        self.received: list[tuple[int, InputKind, str]] = []
        used = {n for node in graph.nodes for n in node.operands()}
        used |= graph.returned
        for i, node in enumerate(graph.inputs):
            self.known.append(executor.given(node) if node.of_model and node in used else None)
            if not node.held:
                self.received.append((i, *node.args))
            elif not node.of_model:
                self.arguments.append((i, places[node.args[1]]))

    def of(self, arguments: Mapping[int, Tensor]) -> list[Any]:
        """The inputs in order, without what other stages send."""
        tensors = self.known.copy()
        for place, argument in self.arguments:
            tensors[place] = arguments[argument]
        return tensors

    def receive(
        self, tensors: list[Any], passed: dict[PassedKey, Any], microbatch: int
    ) -> RankProgram:
        """Take what stages have sent out of `passed`, and put it where it belongs."""
        for place, kind, name in self.received:
            value = passed.pop((kind, name, microbatch))
            tensors[place] = (yield from _arrived(value)) if type(value) is Pending else value

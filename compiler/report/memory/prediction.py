"""What a rank needs to hold: known from the instructions before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from meshwright.compiler.codegen.instructions import Instructions
from meshwright.compiler.graph.aliasing import local_bytes
from meshwright.compiler.graph.ir import TO_DISK, InputKind, Node, OutputKind
from meshwright.compiler.graph.text import op_text, type_text
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import HALF_TYPES
from meshwright.compiler.program import STAGING_BYTES, Compiled, Stored, Update
from meshwright.compiler.report.memory.counter import address
from meshwright.compiler.report.memory.holding import UPDATE, Alive, Memory, Moment
from meshwright.compiler.report.memory.storages import Walk
from meshwright.compiler.report.memory.tensors import Storage, Use
from meshwright.compiler.report.memory.uses import copies
from meshwright.compiler.schedules.actions import Action, Entry, Receive, Send, actions_of


class Sizes:
    """The bytes that one rank of `mesh` holds: as numbers, where a subclass knows no better."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def storage(self, storage: Storage) -> int:
        """Of the memory behind a value."""
        return storage.num_bytes

    def stored(self, stored: Stored) -> int:
        """Of a parameter or a buffer, or of the gradient of one."""
        return stored.local_bytes(self.mesh)

    def value(self, node: Node) -> int:
        """Of an input."""
        return local_bytes(node, self.mesh)

    def state(self, stored: Stored | None, size: int) -> int:
        """Of what an optimizer keeps of a parameter, or of none."""
        return size


def memories(
    program: Compiled, updates: Mapping[int, Update] | None = None, sizes: Sizes | None = None
) -> dict[str, Memory]:
    """The memory of ranks that hold or run what others do not, by their coordinates (`pp=0`), of
    the rank that needs most in a step at each; where all do the same there is one. `updates` are by
    rank, by default those of AdamW."""
    sizes = sizes or Sizes(program.stages[0].forward.mesh)
    updates = program.updates if updates is None else updates
    found: dict[str, Memory] = {}
    for rank, walk in walks_by_rank(program).items():
        each = _Rank(program, rank, walk, updates.get(rank), sizes).memory()
        place = program.place(rank)
        if place not in found or each.peak > found[place].peak:
            found[place] = each
    return found


_TABLES = "tables of random numbers"


class _Rank:
    """The memory of one rank: what outlives a step, and the walk and the update besides."""

    def __init__(
        self, program: Compiled, rank: int, walk: Walk, update: Update | None, sizes: Sizes
    ) -> None:
        self.program, self.walk, self.sizes = program, walk, sizes
        self.update = update or Update("", {}, {})
        self.coords = program.mesh.coords(rank)
        actions = actions_of(program.entries[rank])
        phases = dict.fromkeys((action.stage, action.kind) for action in actions)
        self.graphs = [program.stages[stage].graphs[phase] for stage, phase in phases]
        types = _gradient_types(program)
        self.gradients = {
            s.name: replace(s, type=replace(s.type, dtype=types[s.name]))
            for s in self._held(program.parameters.values())
            if s.name in types
        }
        away = self._away()
        here = {name: s for name, s in self.gradients.items() if not s.kept.update.away}
        self.away, self.gradients = away, here
        self.allocated = sum(map(sizes.storage, walk.allocated.values()))

    def memory(self) -> Memory:
        """All figures."""
        program, lasting = self.program, list(self._lasting())
        sizes = {use: sum(a.bytes for a in lasting if a.use == use) for use in Use}
        gradients = self._bytes(self.gradients.values())
        in_step = [*lasting, *self._in_step(gradients)]
        after = [*lasting, *self._after_step()]
        first = [*(a for a in lasting if not _is_later(a)), *self._in_step(gradients, first=True)]
        alive = max(in_step, after, first, key=_total)
        parts = {use.value: sum(a.bytes for a in alive if a.use == use) for use in Use}
        return Memory(
            parameters=sizes[Use.PARAMETERS],
            masters=self._bytes(self._masters()),
            buffers=sizes[Use.BUFFERS],
            constants=sizes[Use.CONSTANTS],
            batch=sizes[Use.BATCH],
            gradients=gradients,
            optimizer=sizes[Use.OPTIMIZER],
            activations=sum(map(self.sizes.storage, self.walk.saved_at_most)),
            host=self.away["host"],
            disk=self.away["disk"],
            peak=_total(alive),
            peak_at=UPDATE if alive is after else self.walk.tally.peak_at(first=alive is first),
            updated_by=self.update.kind,
            parts={use: size for use, size in parts.items() if size},
            alive=tuple(sorted((a for a in alive if a.bytes), key=lambda each: -each.bytes)),
            timeline=tuple(
                self._timeline(int(_total(in_step)) - self.walk.tally.peak, int(_total(after)))
            ),
            in_place_of="" if program.imagined_on == program.device else program.device.type,
        )

    def _masters(self) -> Iterator[Stored]:
        """The parameters of more than 16 bits of which a step computes copies in 16."""
        parameters = self.program.parameters
        found = (item for stage in self.program.stages for item in copies(stage).items())
        types = ((names, t) for node, names in found for t, _ in node.results if t is not None)
        narrow = {name for names, type in types if type.dtype in HALF_TYPES for name in names}
        return (s for name, s in parameters.items() if name in narrow and _is_wide(s))

    def _away(self) -> Counter[str]:
        """The most bytes that are kept elsewhere, in a step or in an update."""
        found = Counter[str](host=STAGING_BYTES * len(self._folders()))
        for each in self._held(self.program.parameters.values()):
            value, update = each.kept.value, each.kept.update
            size = each.local_bytes(self.program.mesh)
            found[value.to if value.away else update.to] += size
            if each.name in self.gradients:
                found[update.to] += self._bytes([self.gradients[each.name]])
            found[update.to] += self.update.state.get(each.name, 0)
        return found + (self.walk.tally.most_away | Counter(host=self.update.elsewhere))

    def _folders(self) -> set[str]:
        """The folders in which this rank has files."""
        kept = (each.kept for each in self._held(self.program.parameters.values()))
        places = {place.path for each in kept for place in (each.value, each.update)}
        nodes = (node for graph in self.graphs for node in graph.nodes if node.op == TO_DISK)
        return {path for path in {*places, *(node.kwargs["path"] for node in nodes)} if path}

    def _held(self, tensors: Iterable[Stored]) -> Iterator[Stored]:
        return (stored for stored in tensors if stored.held_by(self.coords))

    def _bytes(self, tensors: Iterable[Stored]) -> int:
        return sum(map(self.sizes.stored, self._held(tensors)))

    def _lasting(self) -> Iterator[Alive]:
        """What is there before a step, during it and in an update."""
        program, forward = self.program, self.program.stages[0].forward
        for use, tensors in (
            (Use.PARAMETERS, program.parameters),
            (Use.BUFFERS, program.buffers),
        ):
            for each in self._held(tensors.values()):
                if each.kept.value.away:
                    continue
                text = type_text(each.type, each.layout, forward, local=True)
                yield Alive(self.sizes.stored(each), use.value, each.name, type=text)
        # Each rank has all of a constant, and computes with its part.
        constants = {address(c): (name, c) for name, c in program.captured.constants.items()}
        for name, constant in constants.values():
            yield Alive(constant.untyped_storage().nbytes(), Use.CONSTANTS.value, name)
        yield Alive(self.walk.kept, Use.CONSTANTS.value, _TABLES)
        # Of the inputs, a rank takes those that its own graphs use.
        batch = {
            node.args: (node, graph)
            for graph in self.graphs
            for node in graph.inputs
            if node.args[0] == InputKind.ARGUMENT
        }
        for node, graph in batch.values():
            text = type_text(node.tensor, node.placed, graph, local=True)
            yield Alive(self.sizes.value(node), Use.BATCH.value, str(node.args[1]), type=text)
        for name, size in self.update.state.items():
            if name and program.parameters[name].kept.update.away:
                continue
            size = self.sizes.state(program.parameters[name] if name else None, size)
            yield Alive(size, Use.OPTIMIZER.value, name or self.update.kind)

    def _in_step(self, gradients: int, *, first: bool = False) -> Iterator[Alive]:
        """What is alive at the peak of a step besides."""
        # The smaller buckets keep their memory from step to step.
        yield Alive(gradients - self.allocated, Use.GRADIENTS.value, "gradients between steps")
        changed = {o.name for graph in self.graphs for o in graph.outputs_of(OutputKind.BUFFER)}
        for name in changed if self.program.trains else ():
            size = self._bytes([self.program.buffers[name]])
            yield Alive(size, Use.BUFFERS.value, f"{name}, as it was before the step")
        if not first:
            yield Alive(self.update.beside_steps, Use.TEMPORARIES.value, UPDATE)
        for storage, use in self.walk.tally.at_peak(first=first).items():
            yield self._node(storage, use)

    def _after_step(self) -> Iterator[Alive]:
        """What is alive after a step besides, while the parameters are updated."""
        for each in self.gradients.values():
            yield Alive(self._bytes([each]), Use.GRADIENTS.value, each.name)
        results = sum(map(self.sizes.storage, self.walk.tally.left())) - self.allocated
        yield Alive(results, Use.VALUES.value, "results of the step")
        for operator, size in self.update.temporaries.items():
            yield Alive(size, Use.TEMPORARIES.value, f"{UPDATE}: {operator}")

    def _node(self, storage: Storage, use: Use) -> Alive:
        node, size = storage.node, self.sizes.storage(storage)
        if node is None:
            return Alive(size, use.value, "schedule")
        texts = (
            type_text(type, layout, self.program.stages[0].forward, local=True)
            for type, layout in node.results
            if type is not None and layout is not None
        )
        origin, op = node.origin, op_text(node.op)
        return Alive(
            *(size, use.value, node.name, op, next(texts, "")),
            *(origin.module, origin.source),
        )

    def _timeline(self, lasting: int, in_update: int) -> Iterator[Moment]:
        """`lasting` is what is counted in a step besides the walk."""
        for entry, node, most, alive in self.walk.tally.marks:
            name = "" if node is None else node.name
            yield Moment(str(entry), name, lasting + most, lasting + alive)
        if self.program.trains:
            size = sum(self.update.temporaries.values())
            yield Moment(UPDATE, "", in_update, in_update - size)


def _is_later(each: Alive) -> bool:
    """Whether it is not there yet while the first step makes it, or before an update does."""
    return each.use == Use.OPTIMIZER or each.name == _TABLES


def _is_wide(stored: Stored) -> bool:
    return stored.type.dtype not in HALF_TYPES


def _total(alive: Iterable[Alive]) -> int:
    return sum(each.bytes for each in alive)


def _gradient_types(program: Compiled) -> dict[str, torch.dtype]:
    """The element types of gradients, by parameter: float32 for one of 16 bits under `precision`.
    Parameters that have none are left out."""
    graphs = (graph for stage in program.stages for graph in stage.graphs.values())
    outputs = (output for graph in graphs for output in graph.outputs_of(OutputKind.GRADIENT))
    return {output.name: output.node.tensor.dtype for output in outputs}


def walks(program: Compiled) -> list[Walk]:
    """The storages through a step of one rank for each list of actions in the schedule."""
    return list(dict.fromkeys(walks_by_rank(program).values()))


def walks_by_rank(program: Compiled) -> dict[int, Walk]:
    """The storages through a step, for each of the program's `different_ranks`; they are one where
    the actions are."""
    walked: dict[tuple[Entry, ...], Walk] = {}
    instructions = {each.name: each for each in program.instructions}
    for rank in program.different_ranks:
        entries = program.entries[rank]
        if entries not in walked:
            walked[entries] = _walked(program, rank, instructions)
    return {rank: walked[program.entries[rank]] for rank in program.different_ranks}


def _walked(program: Compiled, rank: int, instructions: Mapping[str, Instructions]) -> Walk:
    """The storages of a rank through its schedule."""
    transfers, coords = program.transfers, program.mesh.coords(rank)
    leaving, staying = transfers.leaving(rank), transfers.staying(rank)
    walk = Walk(program.stages, coords, program.imagined_on, leaving, staying)
    settled, ends = transfers.settled(rank), transfers.ends(rank)
    begun: dict[int, Iterator[None]] = {}
    for place, entry in enumerate(program.entries[rank]):
        for earlier in ends.get(place, ()):
            _finish(begun.pop(earlier))
        walk.tally.entry = entry
        match entry:
            case Action():
                graph = program.stages[entry.stage].graphs[entry.kind]
                running = walk.run(graph, instructions[graph.name], entry)
                if entry.kind.once:
                    begun[place] = running
                    next(running, None)
                else:
                    _finish(running)
            case Send():
                walk.send(place, transfers.values[entry.link], entry.microbatch)
            case Receive():
                walk.receive(transfers.values[entry.link], entry.microbatch)
        for arrived in settled.get(place, ()):
            walk.arrived(arrived)
    for running in begun.values():
        _finish(running)
    walk.end()
    return walk


def _finish(running: Iterator[None]) -> None:
    """Walk what is left of a graph."""
    for _ in running:
        pass

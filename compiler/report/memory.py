"""What a rank needs to hold: known from the instructions before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from meshwright.compiler.codegen.instructions import Instructions
from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import InputKind, OutputKind
from meshwright.compiler.program import Compiled
from meshwright.compiler.report.counter import address
from meshwright.compiler.report.storages import Walk
from meshwright.compiler.schedules.actions import Action, Entry, Receive, Send


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per rank of `parameters`, `buffers`, `gradients` and more.

    `optimizer` is for two moments per parameter, as Adam keeps, in the type of its gradient; what
    an update copies besides is not in it. `activations` are what the forward
    saves for the backward. `peak` is the most alive at once in a step: all of these that are there
    by then, the batch, and what operators use inside themselves, but not what a transport does.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    def to_json(self) -> dict[str, int]:
        """The same as a plain dictionary."""
        return asdict(self)


def memories(program: Compiled) -> dict[str, Memory]:
    """The memory of ranks that hold or run what others do not, by their coordinates (`pp=0`), of
    the rank that needs most in a step at each; where all do the same there is one."""
    found: dict[str, Memory] = {}
    for rank, walk in walks_by_rank(program).items():
        each = _memory(program, program.mesh.coords(rank), walk)
        place = program.place(rank)
        if place not in found or each.peak > found[place].peak:
            found[place] = each
    return found


def _memory(program: Compiled, coords: Mapping[str, int], walk: Walk) -> Memory:
    mesh, held = program.mesh, [s for s in program.parameters.values() if s.held_by(coords)]
    trained = [stored for stored in held if stored.requires_grad and program.trains]
    parameters = sum(stored.local_bytes(mesh) for stored in held)
    buffers = sum(s.local_bytes(mesh) for s in program.buffers.values() if s.held_by(coords))
    types = _gradient_types(program)
    gradients = sum(
        replace(s, type=replace(s.type, dtype=types.get(s.name, s.type.dtype))).local_bytes(mesh)
        for s in trained
    )
    forwards = [stage.forward for stage in program.stages]
    batch = {
        node.args: node_bytes(node, forward)
        for forward in forwards
        for node in forward.inputs
        if node.args[0] == InputKind.ARGUMENT
    }
    # Each rank has all of a constant, and computes with its part.
    constants = {
        address(c): c.untyped_storage().nbytes() for c in program.captured.constants.values()
    }
    lasting = parameters + buffers + 3 * gradients + sum(constants.values())
    return Memory(
        parameters,
        buffers,
        gradients,
        2 * gradients,
        walk.most_saved,
        lasting + sum(batch.values()) + _peak(walk),
    )


def _peak(walk: Walk) -> int:
    """The most bytes alive at once, without gradients for which there is memory before the step."""
    return walk.peak - sum(storage.num_bytes for storage in walk.allocated.values())


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
    """The storages through a step, for the first rank of each set of those that run the same
    actions and hold parts of the same tensors; they are one where the actions are."""
    walked: dict[tuple[Entry, ...], Walk] = {}
    found: dict[tuple[Any, ...], int] = {}
    instructions = {each.name: each for each in program.instructions}
    for rank, entries in program.entries.items():
        found.setdefault((entries, program.place(rank)), rank)
        if entries not in walked:
            walked[entries] = _walked(program, rank, instructions)
    return {rank: walked[entries] for (entries, _), rank in found.items()}


def _walked(program: Compiled, rank: int, instructions: Mapping[str, Instructions]) -> Walk:
    """The storages of a rank through its schedule."""
    walk = Walk(program.stages, program.mesh.coords(rank), program.device)
    transfers, settled = program.transfers, program.transfers.settled(rank)
    received = set[Any]()
    for entry in program.entries[rank]:
        if not isinstance(entry, Action):
            keys = [(*each.args, entry.microbatch) for each in transfers.values[entry.link]]
            (walk.leaving if isinstance(entry, Send) else received).update(keys)
        else:
            taken = program.stages[entry.stage].received(entry.kind)
            walk.staying.update((*each.args, entry.microbatch) for each in taken)
    walk.staying -= received
    for place, entry in enumerate(program.entries[rank]):
        match entry:
            case Action():
                graph = program.stages[entry.stage].graphs[entry.kind]
                walk.run(graph, instructions[graph.name], entry)
            case Send():
                walk.send(place, transfers.values[entry.link], entry.microbatch)
            case Receive():
                walk.receive(transfers.values[entry.link], entry.microbatch)
        for arrived in settled.get(place, ()):
            walk.arrived(arrived)
    return walk

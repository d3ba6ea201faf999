"""What a rank needs to hold: known from the instructions before anything runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import InputKind
from meshwright.compiler.program import Compiled
from meshwright.compiler.report.storages import Walk
from meshwright.compiler.stages import Action


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per rank of `parameters`, `buffers`, `gradients` and more.

    `optimizer` is for two moments per parameter, as Adam keeps; `activations` are what the forward
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


def memory(program: Compiled) -> Memory:
    """The memory of the rank that needs most, in one step."""
    trained = [s for s in program.parameters.values() if s.requires_grad and program.trains]
    mesh = program.mesh
    parameters = sum(stored.local_bytes(mesh) for stored in program.parameters.values())
    buffers = sum(stored.local_bytes(mesh) for stored in program.buffers.values())
    gradients = sum(stored.local_bytes(mesh) for stored in trained)
    forwards = [stage.forward for stage in program.stages]
    given = {
        node.args: len(forward.mesh.turns) * node_bytes(node, forward)
        for forward in forwards
        for node in forward.inputs
        if node.args[0] in (InputKind.ARGUMENT, InputKind.CONSTANT)
    }
    walked = walks(program)
    return Memory(
        parameters,
        buffers,
        gradients,
        2 * gradients,
        max(each.most_saved for each in walked),
        parameters + buffers + 3 * gradients + sum(given.values()) + max(w.peak for w in walked),
    )


def walks(program: Compiled) -> list[Walk]:
    """The storages through a step of one rank for each list of actions in the schedule."""
    found: dict[tuple[Action, ...], Walk] = {}
    instructions = {each.name: each for each in program.instructions}
    for rank, actions in program.schedule.items():
        if actions not in found:
            coords = program.mesh.coords(rank)
            walk = found[actions] = Walk(program.stages, coords, program.device)
            for action in actions:
                graph = program.stages[action.stage].graphs[action.kind]
                walk.run(graph, instructions[graph.name], action)
    return list(found.values())

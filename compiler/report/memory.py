"""What a rank needs to hold: known from the graphs before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from meshwright.compiler.graph.aliasing import node_bytes, storage
from meshwright.compiler.graph.ir import INPUT, SAVED, Graph, MeshOp, Node, OutputKind, TensorType
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.program import Compiled
from meshwright.compiler.stages import Action


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes per rank of `parameters`, `buffers`, `gradients` and more.

    `optimizer` is for two moments per parameter, as Adam keeps; `activations` are what the forward
    saves for the backward; `peak` is the most alive at once in a step, parameters, gradients and
    optimizer state included, but not what operators use inside themselves.
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
    """The memory of one rank and step."""
    trained = [s for s in program.parameters.values() if s.requires_grad]
    parameters = sum(
        _bytes(TensorType(s.padded_shape, s.type.dtype), s.layout, program)
        for s in program.parameters.values()
    )
    gradients = 0
    if program.trains:
        gradients = sum(
            _bytes(TensorType(s.padded_shape, s.type.dtype), s.layout, program) for s in trained
        )
    buffers = sum(_bytes(s.type, s.layout, program) for s in program.buffers.values())
    fixed = parameters + buffers + 3 * gradients
    activations, peak = _peak(program)
    return Memory(parameters, buffers, gradients, 2 * gradients, activations, fixed + peak)


def _peak(program: Compiled) -> tuple[int, int]:
    """The most bytes that any rank has saved at once, and the most alive at once."""
    found = [_peak_of(program, actions) for actions in set(program.schedule.values())]
    saved, alive = zip(*found, strict=True)
    return max(saved), max(alive)


def _peak_of(program: Compiled, actions: Iterable[Action]) -> tuple[int, int]:
    kept: dict[tuple[int, int], dict[Node, set[str]]] = {}
    """By stage and microbatch: what is saved, with the numbers that are still to be taken."""
    sizes: dict[Node, int] = {}
    most_saved = peak = 0
    for action in actions:
        graph = program.stages[action.stage].graphs[action.kind]
        own = kept.setdefault((action.stage, action.microbatch), {})
        taken = {str(node.args[0]) for node in graph.nodes if node.op == SAVED}
        dying = {node: sizes[node] for node, numbers in own.items() if numbers <= taken}
        others = sum(sizes[node] for each in kept.values() for node in each) - sum(dying.values())
        named = {node.name: size for node, size in dying.items()}
        peak = max(peak, others + liveness_peak(graph, named))
        kept[action.stage, action.microbatch] = own = {
            node: numbers - taken for node, numbers in own.items() if node not in dying
        }
        sizes.update(saved_bytes(graph))
        for output in graph.outputs_of(OutputKind.SAVED):
            if (memory := storage(output.node)) in sizes:
                own.setdefault(memory, set()).add(output.name)
        most_saved = max(most_saved, sum(sizes[node] for each in kept.values() for node in each))
    return most_saved, peak


def _bytes(type: TensorType, layout: Layout, program: Compiled) -> int:
    return math.prod(layout.local_shape(program.mesh)) * type.dtype.itemsize


def saved_bytes(graph: Graph) -> dict[Node, int]:
    """Bytes per rank of each storage that a graph hands to a later one of its stage."""
    handed = (storage(output.node) for output in graph.outputs_of(OutputKind.SAVED))
    return {node: node_bytes(node, graph) for node in dict.fromkeys(handed) if not node.held}


def liveness_peak(graph: Graph, saved: Mapping[str, int]) -> int:
    """The most bytes alive at once while `graph` runs, inputs not counted, `saved` as popped."""
    last: dict[Node, int] = {}
    for i, node in enumerate(graph.nodes):
        last[storage(node)] = i
        for operand in node.operands():
            last[storage(operand)] = i
    for node in graph.returned:
        last[storage(node)] = len(graph.nodes)
    dying: dict[int, list[Node]] = {}
    for node, i in last.items():
        dying.setdefault(i, []).append(node)
    alive = peak = sum(saved.values())
    for i, node in enumerate(graph.nodes):
        if storage(node) is node and not _held_elsewhere(node):
            alive += node_bytes(node, graph)
            peak = max(peak, alive)
        alive -= sum(
            saved.get(gone.name, 0) if gone.op == SAVED else node_bytes(gone, graph)
            for gone in dying.get(i, ())
            if gone.op == SAVED or not _held_elsewhere(gone)
        )
    return peak


def _held_elsewhere(node: Node) -> bool:
    """Inputs, handed-over values and gradient buckets are counted once for the whole step."""
    return node.op in (INPUT, SAVED, MeshOp("bucket"), MeshOp("bucket_item"))

"""The stages of a pipeline: what they run, what they send one another, what each computes again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from meshwright.compiler.graph.ir import (
    INPUT,
    MOVES,
    SAVED,
    WAIT,
    Graph,
    InputKind,
    Node,
    OutputKind,
    Phase,
)
from meshwright.compiler.graph.names import fold
from meshwright.compiler.graph.text import node_type_text
from meshwright.compiler.program import Compiled
from meshwright.compiler.report.ledger import Moved, ledger
from meshwright.compiler.report.memory.prediction import walks
from meshwright.compiler.stages import Stage
from meshwright.dsl.statements import Stages


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage: `at` are the coordinates of its ranks, `modules` run in it, `num_parameters` counts
    the numbers of the parameters that it holds, and `saved` are the bytes per rank that it keeps of
    one microbatch for the backward."""

    number: int
    at: str
    modules: tuple[str, ...]
    num_parameters: int
    saved: int


@dataclass(frozen=True, slots=True)
class Passed:
    """Values of one type that go from stage to stage along `paths`, each `times` in a step; for
    each, a rank sends `bytes`. One that later stages take is relayed: its path has all of them."""

    phase: str
    type: str
    paths: tuple[tuple[int, ...], ...]
    modules: tuple[str, ...]
    times: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Repeated:
    """A value that no parameter feeds, such as a mask: each of `stages` computes it again, which
    costs less than to send it."""

    type: str
    module: str
    stages: tuple[int, ...]


def schedule_text(program: Compiled) -> str:
    """The schedule and the number of its microbatches; empty without a pipeline."""
    for statement in program.plan.of(Stages):
        if not program.trains:
            return "each runs one forward"
        return f"{statement.schedule}, microbatches: {program.table.microbatches}"
    return ""


def stage_rows(program: Compiled) -> Iterator[StageRow]:
    """The stages; nothing without a pipeline."""
    if not program.pipeline:
        return
    found: dict[str, set[int]] = {}
    for stage in program.stages:
        for node in _own(stage):
            for path, _ in node.origin.modules:
                found.setdefault(path, set()).add(stage.number)
    saved = {node: size for walk in walks(program) for node, size in walk.saved.items()}
    for stage in program.stages:
        own = [path for path, stages in found.items() if path and stages == {stage.number}]
        whole = [path for path in own if path.rpartition(".")[0] not in own]
        yield StageRow(
            stage.number,
            _places(program, stage.number),
            tuple(fold(whole, [name for name, _ in program.model.named_modules() if name])),
            _num_parameters(program, stage),
            sum(size for node, size in saved.items() if node in stage.forward.nodes),
        )


def _own(stage: Stage) -> Iterator[Node]:
    """What a stage computes in the forward, but for what every stage computes for itself."""
    free = _free(stage)
    for phase, graph in stage.graphs.items():
        if phase in (Phase.BEFORE, Phase.FORWARD):
            made = (node for node in graph.nodes if node.op not in (INPUT, SAVED))
            yield from (node for node in made if node not in free)


def _places(program: Compiled, stage: int) -> str:
    ranks = program.mesh.group(0, program.pipeline)
    return " and ".join(program.place(ranks[c]) for c in program.table.holders[stage])


def _num_parameters(program: Compiled, stage: Stage) -> int:
    """The numbers in the parameters that a stage takes as inputs: others it is sent."""
    taken = {n.args[1] for graph in stage.graphs.values() for n in graph.inputs if n.of_model}
    return sum(math.prod(p.type.shape) for name, p in program.parameters.items() if name in taken)


def passed(program: Compiled) -> Iterator[Passed]:
    """What stages send one another, values of one type together."""
    items: dict[str, list[Moved]] = {}
    for item in ledger(program):
        if item.kind == "transfer":
            items.setdefault(item.value, []).append(item)
    onwards = _onwards(program)
    groups: dict[tuple[str, str, int, int], list[tuple[tuple[int, ...], str]]] = {}
    for name, own in items.items():
        if name in onwards.values():
            continue
        first, path, last = own[0], list(own[0].stages), name
        while (last := onwards.get(last, "")) in items:
            path.append(items[last][0].stages[1])
        key = (first.phase, first.type, sum(each.times for each in own), first.bytes)
        groups.setdefault(key, []).append((tuple(path), first.module))
    known = [name for name, _ in program.model.named_modules() if name]
    for (phase, type, times, size), found in groups.items():
        paths, inside = zip(*found, strict=True)
        modules = tuple(fold(list(filter(None, inside)), known))
        yield Passed(
            phase, type, paths, tuple(fold(list(filter(None, modules)), known)), times, size
        )


def _onwards(program: Compiled) -> dict[str, str]:
    """By the name of a value that a stage is sent and sends on as it is: the name under which."""
    return {
        str(output.node.args[1]): output.name
        for stage in program.stages
        for phase in stage.graphs
        for output in stage.sent(phase)
        if output.node.op == INPUT and not output.node.held
    }


def repeated(program: Compiled) -> Iterator[Repeated]:
    """What more than one stage computes though the model does once."""
    found: dict[tuple[Any, ...], tuple[Node, Graph, list[int]]] = {}
    for stage in program.stages if program.pipeline else ():
        for node, graph in _taken(stage).items():
            key = (
                node.op,
                replace(node.origin, stage=0, region=""),
                str(node.type),
                str(node.layout),
            )
            known = found.setdefault(key, (node, graph, []))
            if stage.number not in known[2]:
                known[2].append(stage.number)
    for node, graph, stages in found.values():
        if len(stages) > 1:
            yield Repeated(node_type_text(node, graph), node.origin.module, tuple(stages))


def _taken(stage: Stage) -> dict[Node, Graph]:
    """What no parameter feeds and others take, as it was computed; without numbers."""
    free, found = _free(stage), dict[Node, Graph]()
    for phase in stage.graphs:
        graph = stage.graphs[phase]
        for node in graph.nodes:
            taken = () if node in free else node.operands()
            for each in taken:
                made = free.get(each)
                if made is not None and math.prod(made[0].tensor.shape) > 1:
                    found[made[0]] = made[1]
    return found


def _free(stage: Stage) -> dict[Node, tuple[Node, Graph]]:
    """What no parameter feeds in a stage: where it was computed, and in which graph."""
    found: dict[Node, tuple[Node, Graph]] = {}
    fixed: set[Node] = set()
    saved: dict[str, Node] = {}
    for graph in stage.graphs.values():
        for node in graph.nodes:
            if node.op == INPUT:
                if node.held and node.args[0] != InputKind.PARAMETER:
                    fixed.add(node)
            elif node.op == SAVED:
                made = found.get(saved[str(node.args[0])])
                if made is not None:
                    found[node] = made
            elif node.op in (*MOVES, WAIT):
                if node.args[0] in found:
                    found[node] = found[node.args[0]]
            elif all(each in found or each in fixed for each in node.operands()):
                found[node] = (node, graph)
        saved |= {output.name: output.node for output in graph.outputs_of(OutputKind.SAVED)}
    return found

"""What the backward computes again: how many operators, and the floating-point operations of these
on top of those of a step without `checkpoint`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from meshwright.compiler.graph.flops import flops
from meshwright.compiler.graph.ir import GETITEM, MeshOp, Node
from meshwright.compiler.graph.names import fold
from meshwright.compiler.program import Compiled
from meshwright.compiler.schedules.actions import actions_of
from meshwright.dsl.resolve import resolve
from meshwright.dsl.statements import Checkpoint

_NOT_COUNTED = (GETITEM, MeshOp("vary"))
"""What computes nothing: an item of a result, and where a value begins to differ between ranks."""
_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Regions that the backward computes again, all alike.

    `regions` are selectors of their modules, `count` is how many they are, and `operators` how many
    operators each computes again in a microbatch; `flops` are the floating-point operations of all
    of them in a step, on one rank, and `plan_line` the places of their statements.
    """

    regions: tuple[str, ...]
    count: int
    operators: int
    flops: int
    plan_line: str


def recomputed(program: Compiled) -> tuple[Recomputed, ...]:
    """What the backward computes again, by region; equal regions are one item."""
    names = [name for name, _ in program.model.named_modules()]
    places = {name: place for place, name in enumerate(names)}
    said, regions = _said(program), dict[str, list[tuple[Node, int]]]()
    for node, size in sorted(_again(program), key=lambda each: places[each[0].origin.module]):
        regions.setdefault(node.origin.region, []).append((node, size))
    alike: dict[tuple[int, int, str], list[str]] = {}
    for region, found in regions.items():
        key = _num_operators(found), sum(size for _, size in found), _lines(said, found)
        alike.setdefault(key, []).append(region)
    return tuple(
        Recomputed(tuple(fold(own, names[1:])), len(own), operators, len(own) * size, line)
        for (operators, size, line), own in alike.items()
    )


def recomputed_in(program: Compiled, test: Callable[[Node], bool]) -> Recomputed | None:
    """What the backward computes again of the nodes for which `test` is true; None for nothing."""
    found = [(node, size) for node, size in _again(program) if test(node)]
    if not found:
        return None
    regions = tuple(dict.fromkeys(node.origin.region for node, _ in found))
    size, lines = sum(size for _, size in found), _lines(_said(program), found)
    return Recomputed(regions, len(regions), _num_operators(found), size, lines)


def share_recomputed(program: Compiled) -> float:
    """How many more operations a rank has in a step than without `checkpoint`, as a share of these;
    of ranks that run different stages, the largest."""
    return max(map(float, _shares(program)), default=0.0)


def _shares(program: Compiled) -> Iterator[float]:
    for runs in _runs(program).values():
        again = other = 0
        for stage in program.stages:
            for phase, graph in stage.graphs.items():
                for node in graph.nodes if runs[stage.number, phase] else ():
                    size = runs[stage.number, phase] * flops(node, graph.mesh)
                    again += size if node.origin.region else 0
                    other += 0 if node.origin.region else size
        yield again / other if other else 0.0


def _runs(program: Compiled) -> dict[str, Counter[object]]:
    """How often ranks at each place run the graph of a stage and phase in a step."""
    return {
        program.place(rank): Counter((each.stage, each.kind) for each in actions_of(entries))
        for rank, entries in program.entries.items()
    }


def _again(program: Compiled) -> Iterator[tuple[Node, int]]:
    """What is computed again, with its operations in a step on the rank that runs it most."""
    runs = _runs(program).values()
    for stage in program.stages:
        for phase, graph in stage.graphs.items():
            times = max((each[stage.number, phase] for each in runs), default=0)
            for node in graph.nodes if times else ():
                if node.origin.region:
                    yield node, times * flops(node, graph.mesh)


def _num_operators(found: list[tuple[Node, int]]) -> int:
    return sum(node.op not in _NOT_COUNTED for node, _ in found)


def _said(program: Compiled) -> dict[str, Checkpoint]:
    """The statement for each module that has one."""
    statements = program.plan.of(Checkpoint)
    root = any(not target.segments for each in statements for target in each.targets)
    names = (name for name, _ in program.model.named_modules() if name or root)
    return resolve(statements, list(names)) if statements else {}


def _lines(said: Mapping[str, Checkpoint], found: list[tuple[Node, int]]) -> str:
    """The places of the statements behind what is computed again."""
    paths = (path for node, _ in found for path, _ in node.origin.modules)
    lines = (said[path].plan_line for path in dict.fromkeys(paths) if path in said)
    return ", ".join(dict.fromkeys(filter(None, lines)))


def flops_text(count: int) -> str:
    """`768 FLOP`, `1.5 kFLOP`, `12.0 GFLOP`."""
    size, unit = float(count), _UNITS[0]
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == _UNITS[0] else f"{size:.1f} {unit}"

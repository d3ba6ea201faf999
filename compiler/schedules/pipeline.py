"""The schedule of a program that is cut into stages: a table, filled in for its graphs."""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import InputKind, Phase
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.schedules.actions import Link, Schedule
from meshwright.compiler.schedules.faults import find_fault
from meshwright.compiler.schedules.moves import whole
from meshwright.compiler.schedules.tables import Table
from meshwright.compiler.stages import PASSED_AS, Stage

Passed = tuple[InputKind, str]
"""What a value is to the stage that takes it, and its name."""


def links_of(stages: Iterable[Stage]) -> dict[Link, tuple[Passed, ...]]:
    """The links between stages, and the values that go along each, in the order in which they are
    returned."""
    stages = list(stages)
    takers: dict[Passed, list[tuple[int, Phase]]] = {}
    for stage in stages:
        for phase in stage.graphs:
            for node in stage.received(phase):
                takers.setdefault(tuple(node.args), []).append((stage.number, phase))
    found: dict[Link, list[Passed]] = {}
    for stage in stages:
        for phase in stage.graphs:
            for output in stage.sent(phase):
                passed = PASSED_AS[output.kind], output.name
                for taker in takers.get(passed, ()):
                    found.setdefault(Link(stage.number, phase, *taker), []).append(passed)
    return {link: tuple(values) for link, values in found.items()}


def pipelined(stages: Iterable[Stage], table: Table, mesh: Mesh, axes: tuple[str, ...]) -> Schedule:
    """The schedule of every rank of `mesh`, whose coordinate along `axes` says its row of a table.

    Raises `PassError` if ranks would wait for ever, or compute something else.
    """
    stages = list(stages)
    graphs = frozenset((stage.number, phase) for stage in stages for phase in stage.graphs)
    links = links_of(stages)
    filled = whole(table, graphs, links)
    if fault := find_fault(filled, graphs, links, sends=True):
        raise PassError(str(fault), help="report this: it is a bug")
    ranks = range(mesh.num_ranks)
    return {rank: filled.rows[mesh.position(mesh.coords(rank), axes)] for rank in ranks}

"""The schedule of a program whose ranks all run all stages, one microbatch after the other."""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.schedules.actions import Action
from meshwright.compiler.schedules.tables import Table
from meshwright.compiler.stages import Stage


def same_on_every_rank(stages: Iterable[Stage], mesh: Mesh) -> Table:
    """The table of a single row, in which every rank runs all graphs of all stages.

    For each microbatch in turn: every forward, then, from the last stage to the first, the
    backward and the weight gradients. Counts of all microbatches and what runs once come before
    the first, or after the last.
    """
    listed, turns = list(stages), range(len(mesh.turns))
    first = [Action(Phase.COUNT, s.number, i) for s in listed for i in turns]
    first += [Action(Phase.BEFORE, s.number) for s in listed]
    later = (Phase.BACKWARD, Phase.WEIGHT)
    looped = [
        action
        for i in turns
        for action in (
            *(Action(Phase.FORWARD, s.number, i) for s in listed),
            *(Action(phase, s.number, i) for s in reversed(listed) for phase in later),
        )
    ]
    last = [Action(Phase.AFTER, s.number) for s in reversed(listed)]
    graphs = {(s.number, phase) for s in listed for phase in s.graphs}
    actions = tuple(a for a in (*first, *looped, *last) if (a.stage, a.kind) in graphs)
    return Table(len(turns), ((0,),) * len(listed), (actions,))

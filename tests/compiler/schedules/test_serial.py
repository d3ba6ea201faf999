"""The order in which a rank runs its actions, where nothing else is asked for."""

from __future__ import annotations

from meshwright.compiler.graph.ir import Graph, Phase
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.schedules.serial import same_on_every_rank
from meshwright.compiler.stages import Stage


def test_forwards_run_from_the_first_stage_and_what_follows_from_the_last() -> None:
    mesh = Mesh((("dp", 2), ("micro", 2)), frozenset({"micro"}))
    graphs = {phase: Graph(phase.value, mesh, (), ()) for phase in Phase}
    stages = [Stage(number, graphs) for number in range(2)]
    loop = ["forward 0", "forward 1", "backward 1", "weight 1", "backward 0", "weight 0"]
    expected = [
        *("count 0", "count 0 of microbatch 1", "count 1", "count 1 of microbatch 1"),
        *("before 0", "before 1"),
        *loop,
        *(f"{action} of microbatch 1" for action in loop),
        *("after 1", "after 0"),
    ]
    table = same_on_every_rank(stages, mesh)
    assert (table.microbatches, table.holders) == (2, ((0,), (0,)))
    assert [[str(action) for action in row] for row in table.rows] == [expected]


def test_a_phase_without_a_graph_is_left_out() -> None:
    mesh = Mesh((("dp", 1),))
    whole, short = (
        Stage(number, {phase: Graph(phase.value, mesh, (), ()) for phase in phases})
        for number, phases in enumerate(
            [(Phase.FORWARD, Phase.BACKWARD, Phase.AFTER), (Phase.FORWARD, Phase.BACKWARD)]
        )
    )
    (actions,) = same_on_every_rank([whole, short], mesh).rows
    assert [str(action) for action in actions] == [
        "forward 0", "forward 1", "backward 1", "backward 0", "after 0"
    ]  # fmt: skip

"""The time of a step on paper: the walk of its instructions, with what moves meanwhile.

A rank computes one operator after another. What leaves its device or comes back moves beside that,
one value after another in each direction, and the rank stands still where it needs a value that has
not arrived. What ranks wait for in a pipeline follows from the table of its schedule.
Elsewhere: the copy window of torchtitan's graph trainer.
"""

from __future__ import annotations

from meshwright.compiler.codegen.instructions import Arrive, Call, Instructions, Move, Value
from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import TO_DEVICE, Graph, Node, Phase
from meshwright.compiler.program import Compiled
from meshwright.compiler.schedules.links import links_of
from meshwright.compiler.schedules.simulate import Costs, Simulator
from meshwright.passes.budgets.rates import moving
from meshwright.passes.budgets.windows import operations


def step_time(program: Compiled) -> float:
    """The time of a step of the rank that ends last, in operations, without what ranks send."""
    instructions = {each.name: each for each in program.instructions}

    def time(stage: int, phase: Phase) -> float:
        graph = program.stages[stage].graphs.get(phase)
        return 0 if graph is None else graph_time(instructions[graph.name], graph)

    numbers = range(len(program.stages))
    costs = Costs.of_phases({phase: [time(stage, phase) for stage in numbers] for phase in Phase})
    return Simulator(program.table, links_of(program.stages)).run(costs).makespan


def graph_time(instructions: Instructions, graph: Graph) -> float:
    """The time of one graph, from its first instruction until nothing is on its way."""
    now = 0.0
    free = {False: 0.0, True: 0.0}
    """By direction: when what moves has arrived."""
    arrivals: dict[Value, float] = {}
    called: set[Node] = set()
    for each in instructions.body:
        match each:
            case Call(node=node) if node not in called:
                called.add(node)
                now += operations(node, graph.mesh)
            case Move(handle=handle, node=node):
                back, path = node.op == TO_DEVICE, node.kwargs.get("path")
                took = moving(node_bytes(node, graph), path)
                arrivals[handle] = free[back] = max(now, free[back]) + took
            case Arrive(handle=handle):
                now = max(now, arrivals.get(handle, now))
    return max(now, *free.values())

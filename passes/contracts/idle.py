"""Refuse an axis of the mesh that nothing is split over: its ranks would repeat the same work.

Requires: the graphs that run. Ensures: over each axis of more than one rank some value is split or
pending, or the plan says `allow replicate` of the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from meshwright.compiler.graph.ir import Graph
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.public import Program
from meshwright.dsl.statements import Allow, Data, MeshStatement, Stages


def check_axes(program: Program) -> None:
    """Raises `PlanError` at the first unused axis, with a line that makes use of it."""
    piped = [axis for each in program.plan.of(Stages) for axis in each.over]
    found = _idle_axes(program.mesh, program.graphs().values())
    idle = [axis for axis in found if axis not in piped]
    allowed = (target for each in program.plan.of(Allow) for target in each.targets)
    if not idle or any(target.matches("") for target in allowed):
        return
    axis, size = idle[0], program.mesh.size(idle[0])
    statement = program.plan.of(MeshStatement)[0]
    raise program.plan.error(
        "P503",
        f"nothing is split over `{axis}`: its {size} ranks would repeat the same work",
        statement.at(axis),
        help=f"{_use(program, axis)}, or leave it out of the mesh; to repeat the work, write "
        "`allow replicate **`",
    )


def _idle_axes(mesh: Mesh, graphs: Iterable[Graph]) -> list[str]:
    """The axes of more than one rank over which every value is replicated."""
    idle = [axis for axis in mesh.names if mesh.size(axis) > 1]
    for graph in graphs:
        for node in graph.nodes:
            if not idle:
                return []
            for layout in node.layouts:
                idle = [axis for axis in idle if axis not in layout.axes_used]
    return idle


def _use(program: Program, axis: str) -> str:
    """Help that makes use of the axis: a `data` line where that is sure to work."""
    weights = "split weights over it with `columns` and `rows`"
    found, inputs = program.plan.of(Data), _batch_inputs(program)
    before = {(statement.over, statement.dim) for statement in found}
    if len(before) > 1 or not inputs:
        return weights
    over, dim = before.pop() if before else ((), 0)
    if axis in over:
        return "give the inputs a batch that is not empty"
    over = (*over, axis)
    shapes = [program.captured.input_spec.types[name].shape for name in inputs]
    if any(shape[dim] % program.mesh.size(over) for shape in shapes):
        return weights
    spelt = f"({', '.join(over)})" if len(over) > 1 else axis
    line = f"`data {', '.join(inputs)} over {spelt}{f' dim={dim}' if dim else ''}`"
    return f"{weights}, or the batch with {line}" if found else f"write {line}, {weights}"


def _batch_inputs(program: Program) -> list[str]:
    """The inputs that `data` splits, or would: those with the size that most have in dim 0."""
    shapes = {name: type.shape for name, type in program.captured.input_spec.types.items()}
    found = program.plan.of(Data)
    if found:
        return list(program.plan.resolve(Data, list(shapes)))
    sizes = Counter(shape[0] for shape in shapes.values() if shape)
    if not sizes:
        return []
    batch, _ = sizes.most_common(1)[0]
    return [name for name, shape in shapes.items() if shape and shape[0] == batch]

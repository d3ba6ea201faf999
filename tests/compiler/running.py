"""Run one graph on the virtual mesh, from global tensors to global tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from meshwright.compiler.codegen.linking import RandomState, RankContext
from meshwright.compiler.codegen.lowering import lowered
from meshwright.compiler.codegen.overlap import overlap
from meshwright.compiler.codegen.printing import Pending, printed
from meshwright.compiler.graph.ir import Graph, OutputKind
from meshwright.compiler.layout.layout import shard
from meshwright.compiler.layout.wires import Wait
from meshwright.runtime.rank import RankProgram
from meshwright.runtime.transports.virtual import run_virtual
from tests.compiler.layouts import unshard


def run_graph(graph: Graph, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs by label; `given` are the inputs by name, each cut as its node is laid out.

    Where ranks hold copies of an output, they must be equal. Gradients are returned as other
    outputs are, whether or not they are in buckets.
    """
    returned = (
        replace(each, kind=OutputKind.OUTPUT) if each.kind is OutputKind.GRADIENT else each
        for each in graph.outputs
    )
    code = printed(overlap(lowered(replace(graph, outputs=tuple(returned)))))
    mesh, cpu = graph.mesh, torch.device("cpu")

    def rank(number: int) -> RankProgram:
        coords = mesh.coords(number)
        function = code.link(RankContext(mesh, coords, cpu, RandomState(), {}))
        inputs = [shard(given[n.args[1]], n.placed, mesh, coords) for n in graph.inputs]
        values, _ = yield from function(inputs, {})
        for i, value in enumerate(values):
            if isinstance(value, Pending):
                values = (*values[:i], (yield Wait(value.handle)), *values[i + 1 :])
        return values

    with torch.no_grad():
        ranks = run_virtual([rank(number) for number in range(mesh.num_ranks)], mesh)
    outputs = {}
    for output, *values in zip(graph.outputs, *ranks, strict=True):
        whole = outputs[output.label] = unshard(values, output.node.placed, mesh)
        if not output.node.placed.partial:
            for number, value in enumerate(values):
                own = shard(whole, output.node.placed, mesh, mesh.coords(number))
                torch.testing.assert_close(value, own, rtol=0, atol=1e-12)
    return outputs

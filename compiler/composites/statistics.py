"""Statistics of a split dim: each rank's own, stacked, and gathered on every rank."""

from __future__ import annotations

from dataclasses import replace

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, TensorType
from meshwright.compiler.layout.factors import cut, dim_axes
from meshwright.compiler.placing.composite import LoweringContext
from meshwright.compiler.placing.result_types import result_type
from meshwright.compiler.placing.rules.notation import Call, Dims, Spec


def per_rank(spec: Spec, call: Call, letter: str) -> Spec:
    """The rule with one entry in the result's leading dim `r` for each rank over which `letter` is
    split."""
    (result,) = call.results
    assert result is not None
    ranks = result.shape[0]

    def bind(dims: Dims) -> Dims:
        axes = dim_axes(dims[letter])
        if call.mesh.size(axes) != ranks:
            raise LayoutError(
                f"`{call.op}` has statistics of {ranks} parts, not of {call.mesh.size(axes)}",
                code="statistics",
                help="give them a type with an entry per rank",
            )
        return {"r": cut(ranks, *axes)}

    return replace(spec, bind=bind)


def gathered(context: LoweringContext, axes: tuple[str, ...], op: MeshOp, *args: Arg) -> Node:
    """The statistics `[r, ...]` of all parts over `axes`, everywhere; `op` gives those of one."""
    part = result_type(op, args, {})
    assert isinstance(part, TensorType), op
    type = TensorType((context.mesh.size(axes), *part.shape[1:]), part.dtype)
    stats = context.call(op, *args, type=type)
    return context.reshard(stats, stats.placed.drop_split(axes, context.mesh))

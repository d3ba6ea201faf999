"""The global type of an operator's results: torch's own shape functions, or the composite's."""

from __future__ import annotations

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import Arg, MeshOp, NodeType, Op, map_nodes
from meshwright.compiler.graph.types import torch_type
from meshwright.compiler.placing.composite import composite_of


def result_type(op: Op, args: tuple[Arg, ...], kwargs: dict[str, Arg]) -> NodeType:
    """The type, or tuple of types, that `op` gives on these arguments."""
    typed = map_nodes(args, lambda node: node.tensor)
    if known := composite_of(op):
        return known.result_type(*typed)
    if isinstance(op, MeshOp):
        raise PassError(f"`{op}` is not a composite", help="register its class with `composite`")
    named = {key: map_nodes(value, lambda node: node.tensor) for key, value in kwargs.items()}
    return torch_type(op, typed, named)

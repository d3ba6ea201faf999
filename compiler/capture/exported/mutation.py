"""Functionalise a graph that writes in place."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from meshwright.compiler.capture.exported.writes import writes
from meshwright.compiler.graph.types import portable_operators

_aten = torch.ops.aten


def functionalised(program: ExportedProgram) -> ExportedProgram:
    """The same program without in-place operators; views of what was written are made again.

    Costs a second trace, and so happens only where something is written (a buffer, or a value on
    its way).
    """
    if not any(writes(node) for node in program.graph.nodes):
        return program
    with warnings.catch_warnings(), portable_operators():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its pytrees
        functional: ExportedProgram = program.run_decompositions({})
    return functional


def detach_out_of_place(graph: fx.Graph) -> None:
    """Replace each `detach_` in the graph by a `detach` that the nodes after it use.

    `torch.tensor(...)` in a forward exports as a copy that is then detached so.
    """
    for node in graph.find_nodes(op="call_function", target=_aten.detach_.default):
        source: Any = node.args[0]
        if source.target is not _aten.lift_fresh_copy.default:
            with graph.inserting_after(node):
                source = graph.call_function(_aten.detach.default, (source,))
            source.meta = dict(node.meta)
            for user in [user for user in node.args[0].users if node < user and user is not source]:
                user.replace_input_with(node.args[0], source)
        node.replace_all_uses_with(source)
        graph.erase_node(node)

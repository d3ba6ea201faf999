"""Functionalise a graph that writes in place, unless that would change its gradients."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from meshwright.compiler.capture.origin import origin_of
from meshwright.compiler.capture.stops import has_history
from meshwright.compiler.errors import CaptureError

_aten = torch.ops.aten
_RUNNING_STATISTICS = {_aten.batch_norm.default: 5, _aten.instance_norm.default: 5}
"""Operators that update statistics without saying so in their schema; where they are told to."""


def functionalised(program: ExportedProgram, stopped: set[fx.Node]) -> ExportedProgram:
    """The same program without in-place operators; views of what was written are made again.

    `stopped` are the nodes that ran without gradients. Costs a second trace, and so happens
    only where something is written (a buffer, or a value on its way).
    """
    drop_fresh_detach(program.graph)
    written = [node for node in program.graph.nodes if writes(node)]
    if not written:
        return program
    for node in written:
        _refuse_hidden_write(node, stopped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its pytrees
        functional: ExportedProgram = program.run_decompositions({})
    return functional


def drop_fresh_detach(graph: fx.Graph) -> None:
    """`torch.tensor(...)` in a forward exports as a copy that is then detached in place."""
    for node in graph.find_nodes(op="call_function", target=_aten.detach_.default):
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target is _aten.lift_fresh_copy.default:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def writes(node: fx.Node) -> bool:
    """Whether this node changes one of its operands."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _RUNNING_STATISTICS:
        return bool(node.args[_RUNNING_STATISTICS[node.target]]) and node.args[3] is not None
    return node.target._schema.is_mutable


def _refuse_hidden_write(node: fx.Node, stopped: set[fx.Node]) -> None:
    """Raise if `node` writes, behind autograd's back, to a value that has a gradient.

    In eager mode such a value keeps its history, as if nothing had been written; a functional
    graph has no way to say so.
    """
    for operand in written_operands(node):
        base, hidden = _alias_root(operand, stopped)
        hidden = hidden or node in stopped
        if hidden and has_history(base):
            raise CaptureError(
                f"`{node.target}` changes a value that needs a gradient where autograd cannot see",
                code="hidden write",
                culprit=origin_of(node).source,
                help="compute a new tensor instead of writing in place",
            )


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that `node` changes."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if node.target in _RUNNING_STATISTICS:
        return [value for value in node.args[3:5] if isinstance(value, fx.Node)]
    found: list[fx.Node] = []
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.is_write:
            value: Any = node.args[place] if place < len(node.args) else node.kwargs[argument.name]
            found += [v for v in (value if isinstance(value, (tuple, list)) else [value]) if v]
    return found


def _alias_root(node: fx.Node, stopped: set[fx.Node]) -> tuple[fx.Node, bool]:
    """The value whose memory `node` shares, and whether a stop-gradient lies between."""
    hidden = False
    while node.op == "call_function":
        overload = isinstance(node.target, torch._ops.OpOverload)
        if overload and not _returns_alias(node.target):
            break
        source = node.args[0]
        source = source[0] if isinstance(source, (tuple, list)) else source
        if not isinstance(source, fx.Node):
            break
        hidden |= node in stopped or node.target is _aten.detach.default
        node = source
    return node, hidden


def _returns_alias(target: Any) -> bool:
    arguments, returns = target._schema.arguments, target._schema.returns
    return bool(arguments) and bool(arguments[0].alias_info) and any(r.alias_info for r in returns)

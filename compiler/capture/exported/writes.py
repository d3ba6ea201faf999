"""Which nodes of an exported graph write in place, and to what."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
_RUNNING_STATISTICS = {_aten.batch_norm.default: 5, _aten.instance_norm.default: 5}
"""Operators that update statistics although their schema does not say so, and which argument tells
them to."""


def writes(node: fx.Node) -> bool:
    """Whether this node changes one of its operands."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target in _RUNNING_STATISTICS:
        return bool(node.args[_RUNNING_STATISTICS[node.target]]) and node.args[3] is not None
    return node.target._schema.is_mutable


def written_operands(node: fx.Node) -> list[fx.Node]:
    """The operands that `node`, which writes, changes."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if node.target in _RUNNING_STATISTICS:
        return [value for value in node.args[3:5] if isinstance(value, fx.Node)]
    found: list[fx.Node] = []
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.is_write:
            value: Any = node.args[place] if place < len(node.args) else node.kwargs[argument.name]
            found += [v for v in (value if isinstance(value, (tuple, list)) else [value]) if v]
    return found

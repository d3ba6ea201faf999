"""Where rules that need more than a line are registered."""

from __future__ import annotations

from collections.abc import Callable

from meshwright.compiler.graph.ir import Op
from meshwright.compiler.placing.rules.notation import Rule

FUNCTIONS: dict[Op, Rule] = {}
"""The rules that need more than a line, by operator; filled by `rule`."""


def rule(*ops: Op) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators."""

    def register(function: Rule) -> Rule:
        for op in ops:
            assert op not in FUNCTIONS, op
            FUNCTIONS[op] = function
        return function

    return register

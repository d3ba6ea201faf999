"""Where rules that need more than a line are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from meshwright.compiler.graph.ir import Op
from meshwright.compiler.placing.rules.notation import Rule

FUNCTIONS: dict[Op, Rule] = {}
"""The rules that need more than a line, by operator; filled by `rule`."""


_Rule = TypeVar("_Rule", bound=Rule)


def rule(*ops: Op) -> Callable[[_Rule], _Rule]:
    """Register a function as the rule of these operators."""

    def register(function: _Rule) -> _Rule:
        for op in ops:
            assert op not in FUNCTIONS, op
            FUNCTIONS[op] = function
        return function

    return register

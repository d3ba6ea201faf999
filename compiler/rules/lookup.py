"""Find the rule of an operator: a row of the table, a function, or what its kind implies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch

from meshwright.compiler.ir import Op
from meshwright.compiler.rules.notation import Call, Placement, Spec

Rule: TypeAlias = Callable[[Call], "Spec | Iterable[Placement]"]

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

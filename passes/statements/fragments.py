"""Merge the plans that module classes carry in `__plan__` into the plan file's.

Requires: nothing. Ensures: one plan whose selectors name modules of the whole model.
"""

from __future__ import annotations

from torch import nn

from meshwright.dsl.plan import Plan


def with_fragments(plan: Plan, model: nn.Module) -> Plan:
    """The plan with the fragment of every class, its selectors under each module of the class."""
    paths: dict[type, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(type(module), "__plan__", None), str):
            paths.setdefault(type(module), []).append(name)
    for kind, where in paths.items():
        text: str = kind.__plan__  # type: ignore[attr-defined]
        plan = plan.merged(where, text, f"{kind.__name__}.__plan__")
    return plan

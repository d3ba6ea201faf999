"""What selectors of a plan can name in a captured model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from meshwright.compiler.draft import Draft
from meshwright.dsl.statements import Spread

T = TypeVar("T")


def modules_of(draft: Draft) -> list[str]:
    """The qualified names of all modules of the model, the root left out."""
    return list(draft.modules)


def tensors_of(draft: Draft) -> list[str]:
    """The names of all parameters and buffers, every alias, and of the inputs."""
    return [*draft.captured.aliases, *inputs_of(draft)]


def inputs_of(draft: Draft) -> list[str]:
    """The names of the example's inputs, and of those that only the first program has."""
    return list(dict.fromkeys([*draft.captured.input_names, *(draft.variant_of or ())]))


def of_module(
    found: Mapping[str, Sequence[T]], module: str, statement: Spread, draft: Draft, what: str
) -> Sequence[T]:
    """What was found in a module. Raises `PlanError` if it has nothing of the kind, unless that is
    because this variant of a program does not use the module."""
    if not found.get(module) and draft.variant_of is not None:
        return ()
    if not found.get(module):
        inner = [name for name in found if name.startswith(f"{module}.")]
        shown = ", ".join(f"`{name}`" for name in (inner or list(found))[:3])
        raise draft.plan.error(
            "P501",
            f"`{statement.verb}` needs {what}, and `{module}` does not call one itself",
            statement,
            help=f"name modules that do, such as {shown}" if shown else "name another module",
        )
    return found[module]


def check_divides(draft: Draft, size: int, statement: Spread, tensor: str, what: str) -> None:
    """Raises `PlanError` where `size` does not divide over the statement's axes."""
    ranks = draft.mesh.size(statement.over)
    if size % ranks == 0:
        return
    over = ", ".join(f"{axis}={draft.mesh.size(axis)}" for axis in statement.over)
    usable = [str(n) for n in range(2, min(size, 64) + 1) if size % n == 0][:8]
    choices = " or ".join(filter(None, [", ".join(usable[:-1]), *usable[-1:]]))
    axis = statement.over[0]
    raise draft.plan.error(
        "P203",
        f"cannot split {size} {what} over {over}",
        statement.at("over"),
        subject=tensor,
        help=f"use {axis}={choices}" if usable else "leave it whole",
    )

"""Hold the compiled program to the contracts of its plan.

Requires: a whole program. Ensures: in training, every `expect` holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from meshwright.compiler.public import Program
from meshwright.compiler.report.ledger import Comm
from meshwright.dsl.resolve import resolve
from meshwright.dsl.statements import Expect

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


def check_contracts(program: Program) -> None:
    """Raises `PlanError` at the first `expect` that does not hold, with the number found."""
    if program.mode != "train":
        return
    for statement in program.plan.of(Expect):
        for module in _modules(program, statement) or [""]:
            found = _measure(program, statement, module)
            if not _COMPARE[statement.comparison](found, statement.bound):
                where = f" in `{module}`" if module else ""
                raise program.plan.error(
                    "P502",
                    f"the program has {_spell(statement)} of {found}{where}, "
                    f"not {statement.comparison} {statement.bound}",
                    statement,
                    subject=_evidence(program.comm(), statement, module),
                    help="change the plan, or the bound if it was wrong",
                )


def _measure(program: Program, statement: Expect, module: str) -> int:
    """The number that a contract bounds, for one module ("" is the whole model)."""
    if statement.metric == "peak_memory":
        return program.memory().peak
    return _counted(program.comm(), statement, module).most(
        lambda item: (
            (item.bytes if statement.metric == "bytes" else 1)
            * (item.times if statement.window == "step" else 1)
        )
    )


def _modules(program: Program, statement: Expect) -> list[str]:
    if not statement.targets:
        return []
    named = any(not target.segments for target in statement.targets)
    names = [name for name, _ in program.model.named_modules() if name or named]
    return list(resolve([statement], names))


def _counted(comm: Comm, statement: Expect, module: str) -> Comm:
    inside = comm.under(module) if module else comm
    return inside.where(
        lambda item: (
            statement.metric in ("bytes", item.kind)
            and (not statement.axes or set(statement.axes) <= set(item.axes))
            and statement.window in ("", "step", item.phase)
        )
    )


def _spell(statement: Expect) -> str:
    axes = f"[{', '.join(statement.axes)}]" if statement.axes else ""
    return f"{statement.metric}{axes}"


def _evidence(comm: Comm, statement: Expect, module: str) -> list[str]:
    counted = () if statement.metric == "peak_memory" else _counted(comm, statement, module)
    return [
        f"{item.phase}: {item.kind} of {item.type} in {item.module or 'the model'}"
        for item in list(counted)[:5]
    ]

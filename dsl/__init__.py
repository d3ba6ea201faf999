"""The plan language: text to `Plan`, and back.

Read in this order: grammar.lark (the language), statements.py (what a plan says), selectors.py and
layouts.py (the two notations in it), plan.py (the rest put together).
"""

if __name__ == "dsl":
    raise ImportError(
        "`dsl` is a folder of meshwright's sources: import `meshwright.dsl`, "
        "or a second copy of every class would load"
    )

from meshwright.dsl.builder import PlanBuilder
from meshwright.dsl.errors import CODES, MeshwrightError, PlanError
from meshwright.dsl.plan import Plan
from meshwright.dsl.selectors import Selector
from meshwright.dsl.statements import (
    STATEMENTS,
    Accumulate,
    Allow,
    Axes,
    Checkpoint,
    Columns,
    Context,
    Data,
    Expect,
    Experts,
    Let,
    Memory,
    MeshStatement,
    Offload,
    Precision,
    Rows,
    Sequence,
    Shard,
    Share,
    Stages,
    Statement,
    Summa,
    Vocab,
    Zero,
)  # fmt: skip

__all__ = [
    "CODES",
    "STATEMENTS",
    "Accumulate",
    "Allow",
    "Axes",
    "Checkpoint",
    "Columns",
    "Context",
    "Data",
    "Expect",
    "Experts",
    "Let",
    "Memory",
    "MeshStatement",
    "MeshwrightError",
    "Offload",
    "Plan",
    "PlanBuilder",
    "PlanError",
    "Precision",
    "Rows",
    "Selector",
    "Sequence",
    "Shard",
    "Share",
    "Stages",
    "Statement",
    "Summa",
    "Vocab",
    "Zero",
]

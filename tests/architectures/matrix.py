"""The table of architectures and columns: each plan compared with eager mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import transformers

import meshwright as mw
from meshwright.dsl import statements as s
from meshwright.passes.contracts import allow
from tests.architectures.catalogue import ARCHITECTURES, MIXTURES, Architecture
from tests.equivalence import check_equal, without_grouped

PLANS = Path(__file__).parents[2] / "examples" / "plans"
FLOOR = 1e-2
TENSOR = (s.Columns, s.Rows, s.Shard)
COLUMNS: dict[str, tuple[str, tuple[type[s.Statement], ...]]] = {
    "data": ("mesh dp=2", (s.Data,)),
    "tensor": ("mesh tp=2", TENSOR),
    "sequence": ("mesh tp=2", (*TENSOR, s.Sequence)),
    "vocab": ("mesh tp=2", (*TENSOR, s.Vocab)),
    "all": ("mesh dp=2, tp=2", (*TENSOR, s.Sequence, s.Vocab, s.Data)),
}
"""The mesh of each column, and the statements of a plan that it takes besides `let` and `allow`."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one architecture in one column: a word for the table, and the reason."""

    word: str
    reason: str = ""

    @property
    def is_wrong(self) -> bool:
        return self.word.startswith("**")


def plan_of(name: str, column: str) -> str:
    """The text of an architecture's plan with only the statements that the column takes."""
    whole = mw.Plan.load(PLANS / f"{name}.plan")
    mesh, verbs = COLUMNS[column]
    lines = [mesh]
    for each in whole.statements:
        if isinstance(each, (*verbs, s.Let, s.Allow)):
            assert each.span is not None
            lines += map(whole.source.line, range(each.span.line, each.span.last_line + 1))
    return "\n".join(lines) + "\n"


def check_architecture(architecture: Architecture, plan: str) -> None:
    """Assert that two steps under the plan equal eager mode, and need no gather it did not ask for.

    Models that compute in float32 inside, whatever their type, differ by its rounding.
    """
    with every_gather_refused(), quiet():
        check_equal(
            architecture.build(),
            architecture.batch,
            plan,
            steps=2,
            tolerance=architecture.tolerance,
            floor=FLOOR,
            dtype=architecture.dtype,
            copied=without_grouped if architecture in MIXTURES.values() else copy.deepcopy,
            update=(torch.optim.SGD, {"lr": 0.1}),
        )


def outcome(name: str, column: str) -> Outcome:
    """The outcome of the architecture in the column."""
    architecture = ARCHITECTURES[name]
    if column in architecture.without:
        return Outcome("–", architecture.without[column])
    try:
        check_architecture(architecture, plan_of(name, column))
    except (mw.PlanError, mw.CaptureError, mw.LayoutError) as error:
        return Outcome("refused", str(error))
    except AssertionError as error:
        return Outcome("**wrong**", str(error))
    except Exception as error:  # the rest of the table is still of use
        return Outcome(f"**{type(error).__name__}**", str(error))
    return Outcome("equal")


@contextmanager
def every_gather_refused() -> Iterator[None]:
    """Refuse even small gathers: in a model of real size they would be large."""
    with mock.patch.object(allow, "LIMIT", 0):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out the warnings of transformers about unusual configurations."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(level)

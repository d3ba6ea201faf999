"""`memory budget=60GiB`: choose what the plan leaves open so that a step stays within a budget.

Before:  memory budget=60GiB
After:   zero 2 over dp
         accumulate 2
         checkpoint blocks.[0:12] keep=["up.linear", attention]

Open is the level of `zero`, where the plan has none and splits the batch; the microbatches, where
it has none and no stages; and whether activations are computed again, wait in host memory, or both
that and the optimizer's state. Each choice is compiled, of one capture, and is what it costs on
paper: operations that are computed again, bytes that are sent and moved, and weights that are read
once more in each microbatch. The cheapest that fits is taken, by the walk of its instructions.
Elsewhere: the memory planners of torchtitan and of Colossal-Auto (2302.02599).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import MOVES
from meshwright.compiler.graph.text import size_text, size_written
from meshwright.compiler.program import Budgeted
from meshwright.compiler.public import Program
from meshwright.compiler.schedules.actions import actions_of
from meshwright.dsl.errors import PlanError
from meshwright.dsl.layouts import format_axes
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import (
    Accumulate,
    Checkpoint,
    Data,
    Memory,
    Offload,
    Stages,
    Zero,
)
from meshwright.passes.budgets.recompute import BudgetError

_LINK = 8_000
"""Operations in the time in which a byte is sent or moved: 400 TFLOP/s, 50 GB/s."""
_READ = 130
"""Operations in the time in which a byte is read: 400 TFLOP/s, 3 TB/s."""
_PASSES = 3
"""How often a microbatch reads each weight: forward, and both halves of the backward."""
_MICROBATCHES = (1, 2, 4, 8)

Compile: TypeAlias = Callable[..., Program]


@dataclass(frozen=True)
class _Fit:
    """A program that fits, the statements that were added, and what it costs."""

    program: Program
    texts: tuple[str, ...]
    cost: float


def jointly(plan: Plan, program_of: Compile) -> Program:
    """The program of a plan with a statement `memory`; `program_of` compiles plans without one, and
    `quick=True` to give up early where a budget cannot be kept."""
    return _Search(plan, program_of).made()


class _Search:
    def __init__(self, plan: Plan, program_of: Compile) -> None:
        self.plan, self.program_of = plan, program_of
        (self.statement,) = dict.fromkeys(plan.of(Memory))
        self.budget = f"budget={size_written(self.statement.budget)}"
        self.fits: list[_Fit] = []
        self.failed: list[tuple[int, tuple[str, ...], str]] = []
        """The bytes that choices need which do not fit, and where they do."""
        self.refused: list[PlanError | LayoutError] = []
        """What cannot be compiled, such as a batch that does not divide."""
        self.tries = 0

    def made(self) -> Program:
        for zero in self._levels():
            if self._try_level(zero):
                break
        if not self.fits:
            self._try_elsewhere()
        if not self.fits and self.failed:
            # What needs least of all, with all the time that it takes to say how much that is.
            self._try(min(self.failed)[1], quick=False)
        if not self.fits:
            raise self._too_small()
        best = min(self.fits, key=lambda each: each.cost)
        found, memory = (
            best.program.budgeted,
            max(best.program.memories().values(), key=lambda each: each.peak),
        )
        named = (text for text in best.texts if not _has_budget(text))
        chosen = (*named, *(found.statements if found else ()))
        report = Budgeted(
            *(self.statement.budget, chosen, memory.peak),
            *(found.without if found else memory.peak, found.operations if found else 0),
            *(found.bound if found else 0, self.tries),
        )
        return replace(best.program, budgeted=report)

    def _levels(self) -> Iterator[tuple[str, ...]]:
        """Nothing, then the levels of `zero` over the axes that split the batch."""
        yield ()
        axes = next((each.over for each in self.plan.of(Data) if each.over), ())
        if axes and not self.plan.of(Zero):
            yield from ((f"zero {level} over {format_axes(axes)}",) for level in (1, 2, 3))

    def _try_level(self, zero: tuple[str, ...]) -> bool:
        """Try numbers of microbatches; whether one fits with nothing computed again."""
        said = any(isinstance(each, (Accumulate, Stages)) for each in self.plan.statements)
        for count in (1,) if said else _MICROBATCHES:
            texts = (*zero, *([f"accumulate {count}"] if count > 1 else []))
            found = self._try((*texts, *self._checkpoint()))
            if found is not None and not _operations(found.program):
                return count == 1
        return False

    def _checkpoint(self) -> tuple[str, ...]:
        has = any(each.budget is not None for each in self.plan.of(Checkpoint))
        return () if has else (f"checkpoint {self.budget}",)

    def _try_elsewhere(self) -> None:
        """Try to keep elsewhere what needs most, for the choices that need least."""
        if self.plan.of(Offload):
            return
        for _, texts, _ in sorted(self.failed)[:2]:
            for what in ("optimizer", "parameters"):
                self._try((*texts, f"offload {what}"))

    def _try(self, texts: tuple[str, ...], *, quick: bool = True) -> _Fit | None:
        """Compile the plan with these statements; None if that does not fit, or cannot be."""
        self.tries += 1
        try:
            program = self.program_of(self.plan.with_text(self.statement, *texts), quick=quick)
        except BudgetError as error:
            self.failed.append((error.needed, texts, error.subject[0]))
            return None
        except (PlanError, LayoutError) as error:
            self.refused.append(error)
            return None
        memory = max(program.memories().values(), key=lambda each: each.peak)
        if memory.peak > self.statement.budget:
            self.failed.append((memory.peak, texts, f"it needs that in {memory.peak_at}"))
            return None
        self.fits.append(_Fit(program, texts, _cost(program)))
        return self.fits[-1]

    def _too_small(self) -> PlanError | LayoutError:
        """The error where nothing fits, or nothing can be compiled."""
        if not self.failed:
            return self.refused[0]
        needed, texts, where = min(self.failed)
        said = ", ".join(f"`{text}`" for text in texts if not _has_budget(text))
        return self.plan.error(
            "P504",
            f"the budget is {size_text(self.statement.budget)}, and the least that a rank was "
            f"found to need is {size_text(needed)}",
            self.statement.at("budget"),
            subject=[f"with {said}, and regions computed again" if said else "", where],
            help=f"write `budget={size_written(needed, up=True)}` or more, or split the model over "
            "more ranks",
        )


def _has_budget(text: str) -> bool:
    return text.startswith("checkpoint budget=")


def _operations(program: Program) -> int:
    return program.budgeted.operations if program.budgeted is not None else 0


def _cost(program: Program) -> float:
    """What a step costs besides what every choice does, in operations of one rank."""
    turns = len(program.stages[0].forward.mesh.turns)
    weights = sum(stored.type.num_bytes for stored in program.parameters.values())
    ran = (program.stages[a.stage].graphs[a.kind] for a in actions_of(program.entries[0]))
    moved = sum(node_bytes(n, graph) for graph in ran for n in graph.nodes if n.op in MOVES)
    sent = program.comm().total_bytes()
    again = turns * _operations(program)
    return again + _LINK * (sent + moved) + _READ * _PASSES * (turns - 1) * weights

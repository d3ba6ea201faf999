"""`memory budget=60GiB`: choose what the plan leaves open so that a step stays within a budget.

Before:  memory budget=60GiB
After:   zero 2 over dp
         accumulate 2
         checkpoint blocks.[0:12] keep=["up.linear", attention]
         offload activations blocks.[0:8]

Open is the level of `zero`, where the plan has none and splits the batch; the microbatches, where
it does not say how many; and which blocks are computed again, have what they save in host memory
meanwhile, both or neither (`recompute.py`). Each choice is compiled, of one capture, and the
cheapest that fits is taken, by the walk of its instructions. What it costs is its time on paper:
what it computes, waits for (`clock.py`) and sends, and weights that each microbatch reads once
more. If nothing fits, or at great cost, states are kept in host memory too, where the CPU updates
them. A choice is left out where one before it says that it cannot fit: `zero` and `offload` split
and move states, and change nothing else.
Elsewhere: the memory planners of torchtitan and of Colossal-Auto (2302.02599).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.text import size_text, size_written
from meshwright.compiler.program import Budgeted, Stored
from meshwright.compiler.public import Program
from meshwright.compiler.report.memory.holding import Memory
from meshwright.dsl.errors import PlanError
from meshwright.dsl.layouts import format_axes
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Checkpoint, Data, Offload, Zero
from meshwright.dsl.statements import Memory as Said
from meshwright.passes.budgets.clock import step_time
from meshwright.passes.budgets.rates import READ, SENT, UPDATED
from meshwright.passes.budgets.recompute import BudgetError
from meshwright.passes.statements.accumulate import microbatches

_PASSES = 3
"""How often a microbatch reads each weight: forward, and both halves of the backward."""
_STATES = 4
"""What an update reads of the size of a parameter: itself, its gradient, and AdamW's moments."""
_MICROBATCHES = (1, 2, 4, 8)
_SURE = 0.9
"""The share of what a choice is quickly found to need that it is known to need."""

Compile: TypeAlias = Callable[..., Program]


@dataclass(frozen=True)
class _Choice:
    """What is added to a plan besides regions: a level of `zero` or 0, microbatches, and what of
    the states is kept in host memory."""

    zero: int = 0
    count: int = 1
    away: str = ""


@dataclass(frozen=True)
class _Fit:
    """A program that fits, the statements that were added, and what it costs."""

    program: Program
    choice: _Choice
    texts: tuple[str, ...]
    cost: float


@dataclass(frozen=True)
class _Failed:
    """The bytes that a choice needs and that do not fit, and where; it cannot do with less than the
    `least`, and has states as in `memory`."""

    needed: int
    choice: _Choice
    where: str
    least: int
    memory: Memory


def jointly(plan: Plan, program_of: Compile) -> Program:
    """The program of a plan with a statement `memory`; `program_of` compiles plans without one, and
    `quick=True` to give up early where a budget cannot be kept."""
    return _Search(plan, program_of).made()


class _Search:
    def __init__(self, plan: Plan, program_of: Compile) -> None:
        self.plan, self.program_of = plan, program_of
        (self.statement,) = dict.fromkeys(plan.of(Said))
        self.budget = f"budget={size_written(self.statement.budget)}"
        self.axes = next((each.over for each in plan.of(Data) if each.over), ())
        self.levels = (0, 1, 2, 3) if self.axes and not plan.of(Zero) else (0,)
        self.counts = _MICROBATCHES if microbatches(plan) is None else (1,)
        self.fits: list[_Fit] = []
        self.failed: dict[_Choice, _Failed] = {}
        self.refused: dict[_Choice, PlanError | LayoutError] = {}
        """What cannot be compiled, such as a batch that does not divide."""
        self.tries = 0

    def made(self) -> Program:
        for zero in self.levels:
            if self._try_level(zero):
                break
        if not self.fits and not self.failed:
            raise next(iter(self.refused.values()))
        if not self.fits or _added(self._best().program) > _updating(self._best().program):
            self._try_elsewhere()
        if not self.fits:
            raise self._too_small()
        best = self._best()
        found, memory = best.program.budgeted, _largest(best.program)
        named = (text for text in best.texts if not self._is_budget(text))
        report = Budgeted(
            *(self.statement.budget, (*named, *(found.statements if found else ())), memory.peak),
            *(found.without if found else memory.peak, found.operations if found else 0),
            *(found.bound if found else 0, self.tries),
        )
        return replace(best.program, budgeted=report)

    def _best(self) -> _Fit:
        return min(self.fits, key=lambda each: each.cost)

    def _try_level(self, zero: int) -> bool:
        """Try numbers of microbatches; whether one fits that costs nothing besides."""
        first = self._try(_Choice(zero))
        if first is not None and not _operations(first.program):
            return True
        reach = self.counts[-1] if first is not None else self._reach(zero)
        for count in self.counts:
            if 1 < count <= reach and (first is None or not _is_costlier(first, count)):
                self._try(_Choice(zero, count))
        return False

    def _reach(self, zero: int) -> int:
        """The most microbatches that can be compiled, if they fit: they need the least, but for one
        alone, which adds up no gradients. 1 if they do not."""
        for count in reversed(self.counts[1:]):
            choice = _Choice(zero, count)
            fit = self._try(choice)
            if choice not in self.refused:
                return 1 if fit is None else count - 1
        return 1

    def _try_elsewhere(self) -> None:
        """Try to keep elsewhere what needs most: for the cheapest choice, for that which needs
        least, and for what splits most."""
        said = {each.what for each in self.plan.of(Offload)}
        states = () if said & {"optimizer", "parameters"} else ("optimizer", "parameters")
        bases = [self._best().choice] if self.fits else []
        for choice in dict.fromkeys((*bases, *self._least())):
            for what in (*({"activations"} - said), *states):
                self._try(replace(choice, away=what))
        if not self.fits:
            # What may need least of all, with all the time that it takes to say how much that is.
            closest = min(self.failed.values(), key=lambda each: each.least)
            if closest.least < closest.needed:
                self._try(closest.choice, quick=False)

    def _least(self) -> tuple[_Choice, ...]:
        """The choice that was found to need least, and the one that splits most."""
        if not self.failed:
            return ()
        least = min(self.failed.values(), key=lambda each: each.needed).choice
        return least, _Choice(self.levels[-1], max(each.count for each in self.failed))

    def _try(self, choice: _Choice, *, quick: bool = True) -> _Fit | None:
        """Compile the plan with this choice; None if that does not fit, or cannot be."""
        if quick and self._is_hopeless(choice):
            return None
        self.tries += 1
        texts = tuple(self._texts(choice))
        try:
            program = self.program_of(self.plan.with_text(self.statement, *texts), quick=quick)
        except BudgetError as error:
            self.failed[choice] = _Failed(
                error.needed, choice, error.subject[0], error.least, error.memory
            )
            return None
        except (PlanError, LayoutError) as error:
            self.refused[choice] = error
            return None
        memory = _largest(program)
        if memory.peak > self.statement.budget:
            where = f"it needs that in {memory.peak_at}"
            self.failed[choice] = _Failed(memory.peak, choice, where, memory.peak, memory)
            return None
        self.fits.append(_Fit(program, choice, texts, _cost(program)))
        return self.fits[-1]

    def _is_hopeless(self, choice: _Choice) -> bool:
        """Whether a choice that failed says that this one cannot fit: states apart, it holds as
        much or, with all activations elsewhere, nothing."""
        known = self.failed.get(_Choice(0, choice.count))
        if known is None:
            return False
        parameters, updated = known.memory.parameters, known.memory.gradients
        updated += known.memory.optimizer
        parts = math.prod(dict(self.plan.mesh)[axis] for axis in self.axes)
        moved = {"optimizer": updated, "parameters": updated + parameters}.get(choice.away, 0)
        split = (updated if choice.zero else 0) + (parameters if choice.zero == 3 else 0)
        saved = max(moved, split * (1 - 1 / parts))
        if choice.zero == 3 and choice.away == "optimizer":
            saved = updated + parameters * (1 - 1 / parts)
        least = _SURE * known.least
        if choice.away == "activations":
            least = parameters + updated
        return least - saved > self.statement.budget

    def _texts(self, choice: _Choice) -> Iterator[str]:
        """The statements of a choice, with the budget for what it leaves open."""
        if choice.zero:
            yield f"zero {choice.zero} over {format_axes(self.axes)}"
        if choice.count > 1:
            yield f"accumulate {choice.count}"
        if not any(each.budget is not None for each in self.plan.of(Checkpoint)):
            yield f"checkpoint {self.budget}"
        if not any(each.what == "activations" for each in self.plan.of(Offload)):
            own = choice.away == "activations"
            yield "offload activations" if own else f"offload activations {self.budget}"
        if choice.away in ("optimizer", "parameters"):
            yield f"offload {choice.away}"

    def _is_budget(self, text: str) -> bool:
        return text.endswith(f" {self.budget}")

    def _too_small(self) -> PlanError:
        """The error where nothing fits."""
        found = min(self.failed.values(), key=lambda each: each.needed)
        texts = self._texts(found.choice)
        said = ", ".join(f"`{text}`" for text in texts if not self._is_budget(text))
        return self.plan.error(
            "P504",
            f"the budget is {size_text(self.statement.budget)}, and the least that a rank was "
            f"found to need is {size_text(found.needed)}",
            self.statement.at("budget"),
            subject=[f"with {said}, and regions computed again" if said else "", found.where],
            help=f"write `budget={size_written(found.needed, up=True)}` or more, or split the "
            "model over more ranks",
        )


def _largest(program: Program) -> Memory:
    """The memory of the rank that needs most."""
    return max(program.memories().values(), key=lambda each: each.peak)


def _operations(program: Program) -> int:
    return program.budgeted.operations if program.budgeted is not None else 0


def _is_costlier(fit: _Fit, count: int) -> bool:
    """Whether so many microbatches cost more than one, if they spare all that this one adds: a
    pipeline's ranks are idle for less time with more."""
    program = fit.program
    return not program.pipeline and _reading(program, count) >= _operations(program)


def _cost(program: Program) -> float:
    """What a step costs on paper, in operations of one rank."""
    turns = len(program.stages[0].forward.mesh.turns)
    found = step_time(program) + SENT * program.comm().total_bytes() + _reading(program, turns)
    return found + _updating(program, lambda stored: stored.kept.update.away)


def _added(program: Program) -> int:
    """What the regions of a step and its microbatches cost."""
    turns = len(program.stages[0].forward.mesh.turns)
    return turns * _operations(program) + _reading(program, turns)


def _reading(program: Program, turns: int) -> int:
    """What it costs that so many microbatches read weights, and not one."""
    mesh = program.mesh
    sizes = _most(program, lambda s: math.prod(s.used.local_shape(mesh)) * s.type.dtype.itemsize)
    return READ * _PASSES * (turns - 1) * sizes


def _updating(program: Program, away: Callable[[Stored], bool] = lambda stored: True) -> int:
    """What it costs that the CPU updates parameters that are `away`."""
    size = _most(program, lambda s: away(s) * s.requires_grad * s.local_bytes(program.mesh))
    return UPDATED * _STATES * size


def _most(program: Program, size: Callable[[Stored], int]) -> int:
    """The sum over the parameters of a rank, of the one that has most."""
    stored, coords = program.parameters.values(), program.mesh.coords
    ranks = program.different_ranks
    return max(sum(size(s) for s in stored if s.held_by(coords(rank))) for rank in ranks)

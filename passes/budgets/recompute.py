"""`checkpoint budget=40GiB`: choose what the backward computes again.

Before:  checkpoint budget=40GiB
After:   checkpoint blocks.[0:12] keep=["up.linear", attention]
         checkpoint blocks.[12:20] keep=[linear]

The blocks of the model may be regions, alone or some in a row, and each may keep some operators
(`blocks.py`, `front.py`). What that saves, holds and computes again is counted on the step graph
(`problem.py`), and the least to compute again is the optimum of an integer program (`choice.py`).
What it comes to is then measured by the walk of the instructions that run, and the choice is made
anew with what the walk has found besides, until it repeats itself.
With `offload activations budget=40GiB` beside it, what a block saves may also be elsewhere until
its backward, which costs as much as the device waits for it, at the rates of `rates.py`.
Requires: a joint graph that is about to be separated. Ensures: statements without a budget.
Elsewhere: the two levels of torchtitan's graph trainer; Checkmate (Jain et al., 1910.02653).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import product
from typing import Any

import torch

from meshwright.compiler.graph.ir import Graph
from meshwright.compiler.graph.names import fold
from meshwright.compiler.graph.text import size_text, size_written
from meshwright.compiler.program import Budgeted
from meshwright.compiler.report.memory.holding import UPDATE, Memory
from meshwright.compiler.schedules.tables import Table
from meshwright.dsl.errors import PlanError
from meshwright.dsl.statements import Checkpoint, Offload
from meshwright.dsl.suggest import selectors_of
from meshwright.dsl.writing.printer import options_text
from meshwright.passes.budgets.blocks import Run, runs
from meshwright.passes.budgets.choice import Counts, Options, Place, Problem
from meshwright.passes.budgets.problem import Away, on_paper
from meshwright.passes.budgets.windows import within
from meshwright.passes.schedule import pipeline_table
from meshwright.passes.separate import stage_graphs
from meshwright.passes.statements.balance import flying
from meshwright.passes.statements.checkpoint import checkpoint, words_of
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.targets import modules_of

_MOST_TRIES = 8
"""How often a choice is made anew with what the walk has found."""
_MOST_PARTS = 3
"""How many parts of what is held an error names."""
_AUTO = Fraction(9, 10)
"""The share of a device's memory that `auto` is: allocators and transports need some besides."""


def budget(draft: Draft) -> Draft:
    """`draft` with regions for its `checkpoint` statement that has a budget, if there is one."""
    for statement in draft.plan.of(Checkpoint):
        if statement.budget is not None:
            if draft.captured.mode != "train" or draft.price is None:
                return replace(draft, plan=draft.plan.with_text(statement))
            return _Choice(draft, statement, _offloading(draft)).made()
    return draft


def _offloading(draft: Draft) -> Offload | None:
    """The statement that has activations elsewhere as far as a budget demands, if there is one."""
    own = [each for each in draft.plan.of(Offload) if each.what == "activations"]
    return own[0] if len(own) == 1 and own[0].budget is not None else None


@dataclass(frozen=True)
class _Tried:
    """A choice, and what it comes to by the walk."""

    draft: Draft
    statements: tuple[str, ...]
    memory: Mapping[int, Memory]
    cost: int

    @property
    def peak(self) -> int:
        """Of the rank that needs most."""
        return max(each.peak for each in self.memory.values())


class BudgetError(PlanError):
    """A budget that cannot be kept, the bytes that are `needed`, the `memory` of the rank that
    needs them, and those that it needs at `least`, whatever is chosen, as far as that is known."""

    def __init__(self, *args: Any, needed: int, least: int, memory: Memory, **options: Any) -> None:
        super().__init__(*args, **options)
        self.needed, self.least, self.memory = needed, least, memory


class _Choice:
    """The choice for one statement, and for one about activations that are elsewhere meanwhile."""

    def __init__(self, draft: Draft, statement: Checkpoint, offloading: Offload | None) -> None:
        assert draft.price is not None
        self.draft, self.statement, self.price = draft, statement, draft.price
        self.offloading = offloading
        self.budget = _bytes(draft, statement)
        if offloading is not None and offloading.budget is not None:
            self.budget = min(self.budget, offloading.budget)
        self.tried: dict[tuple[str, ...], _Tried] = {}

    @cached_property
    def graphs(self) -> list[Graph]:
        """The joint graph of each stage."""
        return stage_graphs(self.draft)

    @cached_property
    def runs(self) -> list[Run]:
        """The blocks of the model."""
        return runs(self.draft, self.graphs, _roots(self.draft, self.statement))

    @cached_property
    def problem(self) -> Problem:
        """The choice on paper."""
        words = words_of(self.draft.captured.graph)
        away = _away(self.draft, self.offloading) if self.offloading is not None else None
        papers = [
            on_paper(
                *(self.draft, number, graph, [run for run in self.runs if run.stage == number]),
                *(words, self.statement.keep, away),
            )
            for number, graph in enumerate(self.graphs)
        ]
        return Problem(
            tuple(each for paper in papers for each in paper.options),
            tuple(each for paper in papers for each in paper.gaps),
            tuple(_places(pipeline_table(self.draft), len(self.graphs))),
        )

    def made(self) -> Draft:
        """The draft with the regions that were chosen."""
        without = self._try(None)
        found, bound = without, 0
        if without.peak > self.budget:
            found, bound = self._fitting(without)
        report = Budgeted(
            *(self.budget, found.statements, found.peak, without.peak),
            *(found.cost, min(bound, found.cost), len(self.tried)),
        )
        return replace(found.draft, budgeted=report)

    def _fitting(self, without: _Tried) -> tuple[_Tried, int]:
        """The cheapest of all tries that fit, and the bound."""
        if self.draft.quick and any(_after(each) > self.budget for each in without.memory.values()):
            raise self._too_small(without, _after)
        found, bound = self._search(self.budget, without)
        if not self._fits() and self.draft.quick:
            found += map(self._try, self._usual())
            if not self._fits():
                raise self._too_small(min(found, key=lambda each: each.peak))
        if not self._fits():
            # What needs the least memory does not depend on the budget: what an error names, fits.
            least = self._least(without)
            if least.peak > self.budget:
                raise self._too_small(least)
        else:
            cheapest = min(each.cost for each in self._fits())
            for usual in self._usual():
                if self.problem.cost(usual) < cheapest:
                    self._try(usual)
        return min(self._fits(), key=lambda each: (each.cost, each.peak)), bound

    def _fits(self) -> list[_Tried]:
        """What has been tried and needs no more than the budget."""
        return [each for each in self.tried.values() if each.peak <= self.budget]

    def _search(self, budget: int, without: _Tried) -> tuple[list[_Tried], int]:
        """The choices for a budget, each made with what the walk has found of the one before, and
        the bound of the last."""
        found: list[_Tried] = []
        bound, problem = 0, self._adjusted(self.problem, None, without)
        for _ in range(_MOST_TRIES):
            chosen = problem.best(budget)
            if chosen is None:
                break
            bound = chosen.bound
            tried = self._try(chosen.counts)
            if tried in found:
                break
            found.append(tried)
            problem = self._adjusted(self.problem, chosen.counts, tried)
        return found, bound

    def _least(self, without: _Tried) -> _Tried:
        """What needs the least memory: what does so on paper, with what the walk has found, every
        module for itself, and what is found for ever smaller budgets."""
        found = [without, *map(self._try, self._usual())]
        problem = self._adjusted(self.problem, None, without)
        for _ in range(_MOST_TRIES):
            chosen = problem.least()
            tried = self._try(chosen.counts)
            if tried in found:
                break
            found.append(tried)
            problem = self._adjusted(self.problem, chosen.counts, tried)
        while True:
            least = min(found, key=lambda each: (each.peak, each.cost))
            more, _ = self._search(least.peak - 1, without)
            if all(each.peak >= least.peak for each in more):
                return least
            found += more

    def _usual(self) -> Iterator[Counts]:
        """Every module for itself, and in as many segments as the root of their number: with what
        they save on the device and, where it may be, elsewhere."""
        kinds = {kind.away for each in self.problem.options for kind in each.kinds}
        for away, root in product(sorted(kinds), (False, True)):
            counts = []
            for each in self.problem.options:
                length = math.isqrt(each.size) if root else 1
                own = [0] * len(each.kinds)
                for size, count in ((length, each.size // length), (1, each.size % length)):
                    if (fewest := _fewest(each, size, away)) is not None:
                        own[fewest] += count
                counts.append(tuple(own))
            yield tuple(counts)

    def _adjusted(self, problem: Problem, counts: Counts | None, tried: _Tried) -> Problem:
        """The problem with places that hold besides what the walk has found besides."""
        counts = self._nothing() if counts is None else counts
        peaks = problem.peaks(counts)
        places = (
            replace(place, rest=tried.memory[number].peak - peak)
            for number, (place, peak) in enumerate(zip(problem.places, peaks, strict=True))
        )
        return replace(problem, places=tuple(places))

    def _nothing(self) -> Counts:
        """Every run made of modules that compute as little again as they can."""
        found = []
        for each in self.problem.options:
            plain = [i for i, k in enumerate(each.kinds) if k.modules == 1 and not k.away]
            first = min(plain, key=lambda i: (each.kinds[i].cost, each.kinds[i].length))
            found.append(tuple(each.size * (i == first) for i in range(len(each.kinds))))
        return tuple(found)

    def _try(self, counts: Counts | None) -> _Tried:
        """What a choice comes to, measured once; that of nothing computes nothing again."""
        texts = tuple(self._texts(counts)) if counts is not None else ()
        if texts not in self.tried:
            plan = self.draft.plan.with_text(self.statement, *texts)
            if self.offloading is not None:
                plan = plan.with_text(self.offloading)
            before = replace(self.draft, plan=plan, graph=self.draft.captured.graph)
            draft = replace(self.draft, plan=plan, checkpoints=checkpoint(before).checkpoints)
            cost = 0 if counts is None else self.problem.cost(counts)
            self.tried[texts] = _Tried(draft, texts, self.price(draft), cost)
        return self.tried[texts]

    def _texts(self, counts: Counts) -> Iterator[str]:
        """The statements of a choice."""
        away: list[str] = []
        for run, options, own in zip(self.runs, self.problem.options, counts, strict=True):
            left = list(run.modules)
            for kind, count in zip(options.kinds, own, strict=True):
                modules, left = left[: count * kind.modules], left[count * kind.modules :]
                away += modules if kind.away else []
                if modules and kind.length:
                    segments = count if kind.length > 1 else None
                    said = Checkpoint(segments=segments, keep=kind.keep)
                    yield _text(self.draft, said, modules)
        if away and self.offloading is not None:
            yield _text(self.draft, replace(self.offloading, targets=(), budget=None), away)

    def _too_small(
        self, least: _Tried, known: Callable[[Memory], int] = lambda memory: memory.peak
    ) -> BudgetError:
        """The error, where `known` says what a rank needs whatever is chosen."""
        memory = max(least.memory.values(), key=known)
        parts = sorted(memory.parts.items(), key=lambda each: -each[1])[:_MOST_PARTS]
        held = ", ".join(f"{use} {size_text(size)}" for use, size in parts)
        return BudgetError(
            "P504",
            f"the budget is {size_text(self.budget)}, and the least that a rank needs is "
            f"{size_text(least.peak)}",
            spans=[self.statement.at("budget")],
            subject=f"it needs that in {memory.peak_at}, for {held}",
            help=f"write `budget={size_written(least.peak, up=True)}` or more, or split more: "
            "`zero 3`",
            needed=least.peak,
            least=known(memory),
            memory=memory,
        )


def _bytes(draft: Draft, statement: Checkpoint) -> int:
    """The budget in bytes: for `auto`, of the device or, on the CPU, of this machine's memory,
    which all ranks share."""
    if isinstance(statement.budget, int):
        return statement.budget
    if draft.device is not None and draft.device.type != "cpu":
        if draft.device.type != "cuda" or not torch.cuda.is_available():
            raise draft.plan.error(
                "P501",
                f"`budget=auto` is the memory of a `{draft.device.type}` device, and none is here",
                statement.at("budget"),
                help="write how much it has: `budget=40GiB`",
            )
        total = int(torch.cuda.get_device_properties(draft.device).total_memory)
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // draft.mesh.num_ranks
    return int(total * _AUTO)


def _roots(draft: Draft, statement: Checkpoint) -> list[str]:
    """The modules that a statement leaves to choose among: those that others are not in."""
    if not statement.targets:
        return [""]
    matched = {n for t in statement.targets for n in t.match(modules_of(draft, Checkpoint))}
    return [name for name in draft.modules if name in matched] or [""]


def _places(table: Table | None, num_stages: int) -> Iterator[Place]:
    """The places along a pipeline."""
    if table is None:
        yield Place(dict.fromkeys(range(num_stages), 1), 0)
        return
    by_stage = [flying(table, stage) for stage in range(num_stages)]
    for row in range(len(table.rows)):
        held = {stage: own[row] for stage, own in enumerate(by_stage) if row in own}
        yield Place(held, 0)


def _text(draft: Draft, statement: Checkpoint | Offload, modules: list[str]) -> str:
    """A statement without targets, about these modules."""
    named = ", ".join(
        selectors_of(own)[0] if len(own) == 1 else selector
        for selector, own in fold(modules, draft.modules).items()
    )
    verb = statement.verb
    if isinstance(statement, Offload):
        verb = f"{verb} {statement.what}"
    return " ".join(filter(None, [verb, named, options_text(statement)]))


def _away(draft: Draft, statement: Offload) -> Away:
    """What may be elsewhere: what modules save that a statement names, or all."""
    names = ["", *draft.modules]
    matched = [set(target.match(names)) for target in statement.targets]
    around = set().union(*matched) if matched else {""}
    inside = (name for name in names if any(within(name, each) for each in around))
    return Away(frozenset(inside), statement.path)


def _fewest(options: Options, length: int, away: bool) -> int | None:
    """The kind of regions of so many modules that keeps the fewest operators."""
    kinds = [
        i for i, kind in enumerate(options.kinds) if (kind.length, kind.away) == (length, away)
    ]
    return min(kinds, key=lambda i: len(options.kinds[i].keep), default=None)


def _after(memory: Memory) -> int:
    """The bytes in the update, which do not depend on what is saved for the backward."""
    return next((each.most for each in reversed(memory.timeline) if each.entry == UPDATE), 0)

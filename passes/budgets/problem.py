"""Put the choice of regions on paper: runs of equal modules, priced on the step graph of a stage.

One module of each form stands for all of them, two and three in a row for longer regions, whose
figures grow by the same with each module.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

from meshwright.compiler.graph.ir import INPUT, Graph, Phase
from meshwright.dsl.statements import Checkpoint
from meshwright.passes.budgets.blocks import Run
from meshwright.passes.budgets.choice import Gap, Kind, Options, ordered
from meshwright.passes.budgets.front import Choice, front
from meshwright.passes.budgets.windows import Later, Priced, Window
from meshwright.passes.separate import needs_of
from meshwright.passes.statements.checkpoint import calls_around
from meshwright.passes.statements.draft import Call, Checkpointed, Draft

_MEASURED = 3
"""The most modules in a row that are priced; figures of more follow from these."""
_MOST_JOINED = 4
"""The most choices of what is kept that are tried for regions of many modules."""


@dataclass(frozen=True)
class Away:
    """What may be away while the backward is not there yet: what these modules save, in host memory
    or in files of the folder `path`."""

    modules: frozenset[str]
    path: str | None


@dataclass(frozen=True)
class OnPaper:
    """The runs of a stage with the kinds of regions that they may be, and what is between."""

    options: tuple[Options, ...]
    gaps: tuple[Gap, ...]


def on_paper(
    draft: Draft,
    stage: int,
    graph: Graph,
    runs: Sequence[Run],
    words: set[str],
    keep: tuple[str, ...],
    away: Away | None = None,
) -> OnPaper:
    """The runs of one stage, where `keep` are words that all regions have; with `away`, what the
    regions save may be elsewhere."""
    measured = _Measured(draft, graph, runs, words, away)
    kinds = [tuple(_with_away(_kinds(measured, run, keep), run, away)) for run in runs]
    bases, gaps = _bases(measured.later, runs, [own[0] for own in kinds])
    options = (
        Options(stage, len(run.modules), ordered(own), base)
        for run, own, base in zip(runs, kinds, bases, strict=True)
    )
    return OnPaper(tuple(options), tuple(Gap(stage, many, base) for many, base in gaps.items()))


class _Measured:
    """The windows of a stage: of one module for each form, and of two and three in a row."""

    def __init__(
        self,
        draft: Draft,
        graph: Graph,
        runs: Sequence[Run],
        words: set[str],
        away: Away | None,
    ) -> None:
        self.draft, self.graph, self.words = draft, graph, words
        self.path = away.path if away is not None else None
        # Of a stage without runs nothing else is known.
        self.later = Later(graph, needs_of(draft, graph, draft.checkpoints), ())
        calls: dict[Call, None] = {}
        for node in graph.nodes:
            if node.phase is Phase.FORWARD and node.op != INPUT:
                calls.update(dict.fromkeys(calls_around(node)))
        self.calls = list(calls)
        self.windows: dict[tuple[Hashable, int], Window] = {}
        longest: dict[Hashable, Run] = {}
        for run in runs:
            known = longest.setdefault(run.form, run)
            if len(run.modules) > len(known.modules):
                longest[run.form] = run
        for length in range(1, _MEASURED + 1):
            self._measure(length, longest)

    def _measure(self, length: int, runs: Mapping[Hashable, Run]) -> None:
        regions: dict[Hashable, Checkpointed] = {}
        checkpoints = dict(self.draft.checkpoints)
        for form, run in runs.items():
            if len(run.modules) >= length and (length == 1 or run.times == 1):
                start = min(1, len(run.modules) - length)
                own = run.modules[start : start + length]
                regions[form] = Checkpointed(", ".join(own), Checkpoint(), length > 1)
                calls = [call for call in self.calls if call[0] in own]
                checkpoints.update(dict.fromkeys(calls[:length], regions[form]))
        if regions:
            needs = needs_of(self.draft, self.graph, checkpoints)
            self.later = Later(self.graph, needs, list(regions.values()))
            for form, region in regions.items():
                self.windows[form, length] = Window(self.later, region, self.words, self.path)


def _with_away(
    kinds: Iterable[tuple[int, tuple[str, ...], Priced]], run: Run, away: Away | None
) -> Iterator[Kind]:
    """These kinds, and where it may be, each with what it saves elsewhere."""
    may = away is not None and away.modules.issuperset(run.modules)
    for length, keep, each in kinds:
        yield Kind(length, keep, each.saved, each.peak, each.cost)
        if may and each.large:
            # While a region's backward runs, what the one before it saves is on its way back.
            saved, peak, cost = each.saved - each.large, each.peak + each.large, each.cost
            yield Kind(length, keep, saved, peak, cost + each.exposed, away=True)


def _kinds(
    measured: _Measured, run: Run, keep: tuple[str, ...]
) -> Iterator[tuple[int, tuple[str, ...], Priced]]:
    """What the regions of a run may be: the modules in each (0 for one that is no region), and what
    each keeps and comes to."""
    window = measured.windows[run.form, 1]
    yield 0, (), _times(window.whole(), run.times)
    found = [*front(window, keep), Choice(keep, window.priced(keep))]
    for choice in found:
        yield 1, choice.keep, _times(choice.priced, run.times)
    if run.times > 1:
        return
    spread = range(0, len(found), max(len(found) // (_MOST_JOINED - 1), 1))
    joined = [found[i] for i in spread] + found[-1:]
    for names in dict.fromkeys(choice.keep for choice in joined):
        priced = [
            measured.windows[run.form, length].priced(names)
            for length in range(2, min(_MEASURED, len(run.modules)) + 1)
        ]
        for length in range(2, len(run.modules) + 1):
            yield length, names, _extended(priced, length - 2)


def _times(priced: Priced, times: int) -> Priced:
    """A module that runs multiple times, each of which is a region."""
    return Priced(
        priced.saved * times,
        priced.peak + (times - 1) * priced.saved,
        priced.cost * times,
        priced.large * times,
        priced.exposed * times,
    )


def _extended(priced: Sequence[Priced], place: int) -> Priced:
    """The item at a place of a sequence that grows by the same from its last two items on."""
    if place < len(priced):
        return priced[place]
    one, two = priced[-2:]
    more = place - len(priced) + 1
    return Priced(*(b + more * (b - a) for a, b in zip(astuple(one), astuple(two), strict=True)))


def _bases(
    later: Later, runs: Sequence[Run], whole: Sequence[Kind]
) -> tuple[list[int], dict[int, int]]:
    """The bytes alive besides in the backward of each run, and in the gaps, by the number of runs
    before them: where nothing is computed again, which is what the kinds `whole` say."""
    alive = dict(zip(later.steps(later.nodes, ()), later.alive(later.nodes, ()), strict=True))
    saved = [len(run.modules) * kind.saved for run, kind in zip(runs, whole, strict=True)]
    before = [0, *accumulate(saved)]
    run_of = {path: number for number, run in enumerate(runs) for path in run.modules}
    ends: dict[int, tuple[int, int]] = {}
    for place, node in enumerate(later.nodes):
        number = next((run_of[p] for p, _ in node.origin.modules if p in run_of), None)
        if number is not None and any(later.is_earlier(taken) for taken in later.takes(node)):
            ends[number] = ends.get(number, (place, place))[0], place
    bases = [0] * len(runs)
    gaps: dict[int, int] = {}
    for place, node in enumerate(later.nodes):
        inside = [number for number, (first, last) in ends.items() if first <= place <= last]
        if inside:
            number = max(inside)
            kind = whole[number]
            own = before[number + 1] - kind.saved + kind.peak
            bases[number] = max(bases[number], alive[node] - own)
        else:
            many = sum(last > place for _, last in ends.values())
            gaps[many] = max(gaps.get(many, 0), alive[node] - before[many])
    return bases, gaps

"""Cut a list of pieces into stages whose greatest cost is least.

A stage is a run of pieces. What it costs is what its pieces add up to, and depends on which stage
it is: the first stages of a pipeline hold more microbatches.
Elsewhere: the linear partition problem, which torchgpipe's balance solves for equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Cuts: TypeAlias = tuple[int, ...]
"""The first piece of each stage but the first."""

StageCost: TypeAlias = Callable[[int, int, int], int]
"""What a stage costs: its number, its first piece, and the piece behind its last."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What the stages of a plan were chosen by, and what each costs.

    `by` is `flops`, `parameters` or `memory`, and `costs` are those of the ranks along the
    pipeline, in order: of all stages of each.
    """

    by: str
    costs: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """The greatest cost of a rank over the mean: 1 where all are equal."""
        return max(self.costs) * len(self.costs) / sum(self.costs)


@dataclass(frozen=True)
class Balancer:
    """Chooses where stages begin.

    `sent` are the bytes that go over a cut before each piece, and `ranks` the stages of each rank
    along the pipeline. Of all cuts, the best have the least greatest cost of a stage; of these, the
    most even costs (the least sum of squares), then the fewest bytes, then the earliest stages.
    """

    cost: StageCost
    sent: Sequence[int]
    ranks: Sequence[Sequence[int]]

    @property
    def num_pieces(self) -> int:
        return len(self.sent)

    @property
    def num_stages(self) -> int:
        return 1 + max(max(stages) for stages in self.ranks)

    def costs(self, cuts: Cuts) -> list[int]:
        """What each stage costs."""
        ends = (0, *cuts, self.num_pieces)
        return [self.cost(k, ends[k], ends[k + 1]) for k in range(self.num_stages)]

    def of_ranks(self, cuts: Cuts) -> tuple[int, ...]:
        """What each rank's stages cost together."""
        costs = self.costs(cuts)
        return tuple(sum(costs[stage] for stage in stages) for stages in self.ranks)

    def best(self) -> Cuts:
        """The best cuts into stages of at least one piece each.

        Where ranks have multiple stages, boundaries are then moved one at a time while that lowers
        the greatest cost of a rank, and that of no stage grows beyond the greatest.
        """
        cuts = self._evenest(self._least_greatest())
        return cuts if all(len(stages) == 1 for stages in self.ranks) else self._descended(cuts)

    def _least_greatest(self) -> int:
        """The least greatest cost that stages can have."""
        best = {0: 0}
        for stage in range(self.num_stages):
            best = {
                end: min(max(best[i], self.cost(stage, i, end)) for i in best if i < end)
                for end in self._ends(stage)
            }
        return best[self.num_pieces]

    def _evenest(self, greatest: int) -> Cuts:
        """The best cuts into stages none of which costs more than `greatest`."""
        best: dict[int, tuple[int, int, Cuts]] = {0: (0, 0, ())}
        for stage in range(self.num_stages):
            found: dict[int, tuple[int, int, Cuts]] = {}
            for end in self._ends(stage):
                for start, (squares, sent, cuts) in best.items():
                    cost = self.cost(stage, start, end) if start < end else greatest + 1
                    if cost > greatest:
                        continue
                    own = (start,) if stage else ()
                    more = self.sent[start] if stage else 0
                    option = (squares + cost * cost, sent + more, (*cuts, *own))
                    found[end] = min(option, found.get(end, option))
            best = found
        return best[self.num_pieces][2]

    def _ends(self, stage: int) -> range:
        """Where a stage can end, with at least one piece left for each later one."""
        left = self.num_stages - 1 - stage
        return range(stage + 1 if left else self.num_pieces, self.num_pieces - left + 1)

    def _descended(self, cuts: Cuts) -> Cuts:
        """`cuts` with boundaries moved one at a time, as long as that is better for ranks."""
        best = self._order(cuts), cuts
        while True:
            moved = (
                (*cuts[:i], place, *cuts[i + 1 :])
                for i, (low, high) in enumerate(
                    zip((0, *cuts), (*cuts[1:], self.num_pieces), strict=False)
                )
                for place in range(low + 1, high)
            )
            best = min([best, *((self._order(each), each) for each in moved)])
            if best[1] == cuts:
                return cuts
            cuts = best[1]

    def _order(self, cuts: Cuts) -> tuple[int, int, int, int]:
        """What makes cuts better than others, where ranks have multiple stages."""
        costs = self.costs(cuts)
        sent = sum(self.sent[cut] for cut in cuts)
        return max(costs), max(self.of_ranks(cuts)), sum(cost * cost for cost in costs), sent

"""The stages of the GPT in a pipeline: which blocks each has, and which rank runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from benchmarks.gpt import Size

MICROBATCHES = 8
VIRTUAL = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb": 1, "zbv": 2}
"""The stages per rank of each schedule."""


@dataclass(frozen=True)
class Cut:
    """A schedule and its stages: by stage, its blocks and its rank.

    The first stage has the embeddings as well, and the last the final norm, the head and the loss.
    """

    schedule: str
    blocks: tuple[range, ...]
    ranks: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """The modules that all stages but the first begin with."""
        return [f"blocks.{own.start}" if own else "ln" for own in self.blocks[1:]]


def fits(size: Size, schedule: str, ranks: int) -> bool:
    """Whether there is a block, or the head, for each stage."""
    return ranks * VIRTUAL[schedule] <= size.layers + 1


def balanced(size: Size, schedule: str, ranks: int) -> Cut:
    """The stages with which the rank that has most to compute has least, then the next rank; of
    equal ones, those of which the largest stage is the smallest."""
    count = ranks * VIRTUAL[schedule]
    holders = [k % ranks for k in range(count)]
    if schedule == "zbv":
        holders = [*range(ranks), *reversed(range(ranks))]
    costs = _costs(size)

    def burden(bounds: Sequence[int]) -> tuple[list[float], float]:
        stages = [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
        shares = [0.0] * ranks
        for stage, rank in zip(stages, holders, strict=True):
            shares[rank] += stage
        return sorted(shares, reverse=True), max(stages)

    inner = combinations(range(1, len(costs)), count - 1)
    bounds = min(((0, *cuts, len(costs)) for cuts in inner), key=burden)
    blocks = (range(start, min(stop, size.layers)) for start, stop in pairwise(bounds))
    return Cut(schedule, tuple(blocks), tuple(holders))


def _costs(size: Size) -> list[float]:
    """Multiplications per token of each block, and of the head."""
    block = 12 * size.d**2 + size.length * size.d  # linears, causal attention
    return [block] * size.layers + [size.d * size.vocab]

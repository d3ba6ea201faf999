"""Time peers against each other: in turns, in the same processes, on a watched machine.

On a shared machine a wall time says little, and the ratio of two times taken one after the other
says more. So peers take turns within a round, each round gives one ratio per pair, and the median
ratio is reported with the smallest and the largest.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpt import Size, make_batch
from benchmarks.peers import Peer, mean_over_ranks
from benchmarks.peers.single import losses

QUIET = 0.15
"""Cores that other processes may use in a round that counts as quiet."""
PATIENCE = 20.0
"""Seconds to wait for a quiet machine before a round."""
TOLERANCE = 5e-6
"""Relative difference from one process's loss, which sums in another order, in float32."""
CHECKED = {"tiny": 10, "base": 3}
"""Steps that are compared. AdamW hides a gradient's scale, so a missing reduction shows late:
without that of the norms' gradients, tiny is off by 1e-5 after 3 steps.
"""


@dataclass(frozen=True)
class Round:
    """Milliseconds per step of each peer, and how many cores other processes used meanwhile.

    `times` are those of the slowest rank; `cpu` is the CPU time of all threads of one rank.
    """

    times: dict[str, float]
    cpu: dict[str, float]
    others: float


@dataclass(frozen=True)
class Ratio:
    """The ratios of all rounds: the median, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


class Machine:
    """How busy other processes keep the machine; the ranks themselves do not count."""

    def __init__(self) -> None:
        self.wall, self.busy, self.own = time.perf_counter(), _busy(), time.process_time()

    def others(self) -> float:
        """Cores that other processes used since this was made; the same number on every rank."""
        wall = time.perf_counter() - self.wall
        own = torch.tensor(time.process_time() - self.own, dtype=torch.float64)
        dist.all_reduce(own)
        found = torch.tensor((_busy() - self.busy - own.item()) / wall, dtype=torch.float64)
        dist.broadcast(found, 0)
        return max(0.0, found.item())


def _busy() -> float:
    """Seconds of CPU time that all processes used or other machines stole; 0 where unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _wait, _irq, _softirq, steal = (
        int(ticks) for ticks in stat.read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")


def await_quiet(patience: float = PATIENCE) -> None:
    """Sleep until other processes are quiet, or patience ends."""
    end = time.monotonic() + patience
    while True:
        machine = Machine()
        time.sleep(0.3)
        late = torch.tensor(float(time.monotonic() > end))
        dist.broadcast(late, 0)
        if machine.others() < QUIET or late.item():
            return


def check(peers: Sequence[Peer], size: Size, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Train each peer for some steps; the largest relative difference from one process's losses.

    Raises `AssertionError` when a peer computes something else. It also warms up every peer.
    """
    steps = CHECKED[size.name]
    expected = torch.zeros(steps, dtype=torch.float64)
    if dist.get_rank() == 0:
        expected.copy_(torch.tensor(losses(size, steps)))
    dist.broadcast(expected, 0)
    differences = {}
    for peer in peers:
        found = []
        for step in range(steps):
            loss = peer.step(*make_batch(size, seed=step))
            found.append(mean_over_ranks(loss) if peer.loss_is_local else loss.double())
        off = ((torch.stack(found) - expected).abs() / expected).max().item()
        assert off < tolerance, f"{peer.name}: losses {found} instead of {expected}"
        differences[peer.name] = off
    return differences


def measure(
    peers: Sequence[Peer], size: Size, rounds: int, steps: int, patience: float = PATIENCE
) -> list[Round]:
    """Time `steps` steps of each peer in each round, in an order that rotates by one per round."""
    batch = make_batch(size)
    found = []
    for number in range(rounds):
        await_quiet(patience)
        machine = Machine()
        start = number % len(peers)
        taken = {peer.name: visit(peer, batch, steps) for peer in (*peers[start:], *peers[:start])}
        times, cpu = ({peer.name: taken[peer.name][i] for peer in peers} for i in (0, 1))
        found.append(Round(times, cpu, machine.others()))
    return found


def visit(peer: Peer, batch: tuple[Tensor, Tensor], steps: int) -> tuple[float, float]:
    """Milliseconds per step: on the slowest rank, and of CPU time on the one that used most."""
    if steps > 1:
        peer.step(*batch)  # its memory and caches are cold after the others' turns
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        peer.step(*batch)
    elapsed = torch.tensor([time.perf_counter() - start, time.process_time() - cpu])
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    wall, used = (elapsed * 1e3 / steps).tolist()
    return wall, used


def counted(rounds: Sequence[Round]) -> list[Round]:
    """The quiet rounds; all of them where fewer than three are."""
    quiet = [taken for taken in rounds if taken.others < QUIET]
    return quiet if len(quiet) >= 3 else list(rounds)


def ratio(rounds: Sequence[Round], peer: str, reference: str) -> Ratio:
    """The peer's time divided by the reference's, round by round."""
    return Ratio.of([taken.times[peer] / taken.times[reference] for taken in rounds])


def cpu_ratio(rounds: Sequence[Round], peer: str, reference: str) -> Ratio:
    """The peer's CPU time divided by the reference's: it says more on a busy machine."""
    return Ratio.of([taken.cpu[peer] / taken.cpu[reference] for taken in rounds])

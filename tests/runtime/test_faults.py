"""Every mishap in every phase of a run: nobody hangs, and everyone says who it was and why.

A cell is one start of 2 or 4 ranks, of which one dies, stops, raises, exits, is sent a signal, or
does something else than the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest

from tests.runtime.forked import Ended, Forked, Ranks
from tests.runtime.mishaps import FAULTS, MISTAKES, PHASES

UNLAUNCHED = ("before launch", "in compile", "in launch")
SECONDS_A_RANK = 2
"""To come to `launch`: longer than ranks that are well take on a busy machine."""
NOT_COME = (
    r"ranks? (\d(, | and ))*{c}(( and |, )\d)* ha(s|ve) not come to `launch` within \d+ s",
    r"rank \d cannot reach rank 0 at `.*` after \d+ s: Connection refused",
    r"rank 0, which keeps the store of the run, has ended before all ranks had come",
)
"""A rank that is slow may come when rank 0, whose own words are looked at too, has given up."""
DIED = (
    r"rank {c} died",
    r"rank {c}, which keeps the store of the run, died",
)
SILENT = (
    r"rank {c} does not answer: no heartbeat for \d s",
    r"rank {c}, which keeps the store of the run, does not answer",
)
FAILED = (r"rank {c} failed: .*the loss scale is 0",)
LEFT = (
    r"rank {c} left the program by `sys.exit\(\d\)`",
    r"rank {c} has finished while rank \d waits",
)
DISAGREE = (
    r"members of a group asked for different operations",
    r"no rank can go on: each waits for another\n  rank \d waits in ",
)
SAYS: dict[str, Sequence[str]] = {
    "kill": (*DIED, *SILENT),
    "stop": SILENT,
    "raise": FAILED,
    "exit": LEFT,
    "exit 3": LEFT,
    "_exit": (*DIED, *SILENT),
    "terminate": (r"rank {c} was told to stop \(SIGTERM\)",),
    "interrupt": (r"rank {c} was interrupted \(SIGINT\)",),
    "segfault": (*DIED, *SILENT),
    "abort": (*DIED, *SILENT),
    "another program": (r"ranks? .* compiled a different program than ranks? ",),
    "another shape": DISAGREE,
    "another call": DISAGREE,
    "other inputs": (
        r"ranks were given different batches: `tokens`, `targets`, in call 1 of `step`",
    ),
    "fewer steps": DISAGREE,
    "more steps": DISAGREE,
}
"""What those who stay behind say; `{c}` is the culprit."""


@dataclass(frozen=True)
class Cell:
    """What befalls `culprit`, one of `num_ranks`, and when; a mistake befalls nobody."""

    num_ranks: int
    culprit: int
    what: str
    when: str = ""

    def job(self) -> Ranks:
        """The start that tries it."""
        gone = (self.culprit,) if self.what in FAULTS else ()
        args = (self.what, self.when, str(self.culprit))
        seconds = str(SECONDS_A_RANK * self.num_ranks)
        limit = (("MESHWRIGHT_RENDEZVOUS_SECONDS", seconds),) if self.when in UNLAUNCHED else ()
        return Ranks("tests.runtime.mishaps", self.num_ranks, args, gone, limit, 90.0)

    def complaints(self, ended: Ended) -> list[str]:
        """What is wrong with how the ranks ended."""
        found = []
        for rank in range(self.num_ranks):
            if self.what not in FAULTS or rank != self.culprit:
                found += self._complaints(ended.codes[rank], ended.outputs[rank])
        return found

    def _complaints(self, code: int | None, output: str) -> Iterable[str]:
        if self.when == "in close" and code == 0 and output.endswith("trained\n"):
            return
        if code != 1:
            yield f"{self}: exit code {code}: {output[-2000:]}"
        expected = list(SAYS[self.what])
        if self.when in UNLAUNCHED:
            expected = [*NOT_COME, *expected]
        texts = [text.replace("{c}", str(self.culprit)) for text in expected]
        if not any(re.search(rf"Error: {text}", output) for text in texts):
            yield f"{self}: does not say why: {output[-2000:]}"
        if "\n  help: " not in output:
            yield f"{self}: does not say what to do: {output[-2000:]}"


def check(forked: Forked, cells: Sequence[Cell], at_once: int) -> None:
    """Try the cells, and fail with all that is wrong."""
    by_job = {cell.job(): cell for cell in cells}
    found = []
    for job, ended in forked.run(*by_job, at_once=at_once):
        found += by_job[job].complaints(ended)
    assert not found, "\n\n".join([f"{len(found)} complaints of {len(cells)} cells", *found])


def test_a_few_mishaps_in_a_few_phases(forked: Forked) -> None:
    cells = [
        Cell(2, 0, "kill", "before launch"),
        Cell(2, 1, "exit", "while connecting"),
        Cell(2, 1, "kill", "while connecting"),
        Cell(2, 1, "exit 3", "in step"),
        Cell(4, 3, "segfault", "between steps"),
        Cell(2, 0, "terminate", "in optimizer.step"),
        Cell(2, 1, "interrupt", "in evaluate"),
        Cell(4, 0, "kill", "in save"),
        Cell(2, 1, "raise", "in load"),
        Cell(2, 0, "_exit", "in check"),
        Cell(4, 3, "kill", "in close"),
        Cell(2, 1, "fewer steps"),
    ]
    check(forked, cells, at_once=4)


@pytest.mark.slow
@pytest.mark.parametrize("what", FAULTS)
def test_every_mishap_in_every_phase_of_two_ranks(forked: Forked, what: str) -> None:
    check(forked, [Cell(2, c, what, phase) for c in (0, 1) for phase in PHASES], at_once=6)


@pytest.mark.slow
@pytest.mark.parametrize("what", FAULTS)
def test_every_mishap_in_some_phases_of_four_ranks(forked: Forked, what: str) -> None:
    """Each befalls each of the four, and each phase meets some of them."""
    first, phases = list(FAULTS).index(what), list(PHASES)
    cells = [Cell(4, c, what, phases[(first + 3 * c) % len(phases)]) for c in range(4)]
    check(forked, cells, at_once=4)


@pytest.mark.slow
def test_every_mistake(forked: Forked) -> None:
    cells = [Cell(2, c, what) for c in (0, 1) for what in MISTAKES]
    cells += [Cell(4, place % 4, what) for place, what in enumerate(MISTAKES)]
    check(forked, cells, at_once=4)

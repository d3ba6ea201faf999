"""What the other ranks say when one dies, stalls, fails, finishes early or goes its own way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.forked import Ended, Forked, Ranks
from tests.runtime.processes import environment

MISHAP = Path(__file__).parents[1] / "mishap.py"


SCENARIOS = (
    *((2, "1", scenario) for scenario in ("dies", "stands still", "fails", "finishes")),
    *((2, "0", scenario) for scenario in ("dies", "stands still")),
    *((2, "1", scenario) for scenario in ("hangs in a backend", "is slow")),
    *((4, "3", scenario) for scenario in ("dies", "fails")),
    *((4, "1,2", "turns round"), (2, "1", "compiles differently")),
)
"""Number of ranks, culprits, and what they do; those of a culprit that is gone need not end."""
ENDS_BY_ITSELF = ("is slow", "compiles differently")
Outcomes = dict[tuple[int, str, str], Ended]


@pytest.fixture(scope="module")
def outcomes(forked: Forked) -> Outcomes:
    """How the ranks of every scenario ended; they wait most of the time, so beside one another."""
    jobs = {}
    for num_ranks, culprits, scenario in SCENARIOS:
        gone = () if scenario in ENDS_BY_ITSELF else tuple(map(int, culprits.split(",")))
        job = Ranks("tests.runtime.mishap", num_ranks, (culprits, scenario), gone)
        jobs[job] = (num_ranks, culprits, scenario)
    return {jobs[job]: ended for job, ended in forked.run(*jobs, at_once=4)}


def survivors(outcomes: Outcomes, num_ranks: int, culprits: str, scenario: str) -> dict[int, str]:
    """What every rank but the culprits printed; each has ended by itself, with an error."""
    ended = outcomes[num_ranks, culprits, scenario]
    kept = [rank for rank in range(num_ranks) if str(rank) not in culprits.split(",")]
    assert all(ended.codes[rank] == 1 for rank in kept), ended
    return {rank: ended.outputs[rank] for rank in kept}


ROW, COLUMN = "`hidden_sum` (all_reduce over `tp`)", "`loss_sum` (all_reduce over `dp`)"


@pytest.mark.parametrize(
    ("culprit", "scenario", "problem"),
    [
        (1, "dies", "PeerError: rank 1 died"),
        (1, "stands still", "PeerError: rank 1 does not answer: no heartbeat for 2 s"),
        (1, "fails", "PeerError: rank 1 failed: ZeroDivisionError: the loss scale is 0"),
        (1, "finishes", "PeerError: rank 1 has finished while rank 0 waits"),
        (0, "stands still", "PeerError: rank 0, which keeps the store of the run, does not answer"),
        (0, "dies", "PeerError: rank 0, which keeps the store of the run, died"),
        (1, "hangs in a backend", "PeerError: rank 1 does not answer: no heartbeat for 2 s"),
    ],
)
def test_the_other_rank_says_what_happened(
    outcomes: Outcomes, culprit: int, scenario: str, problem: str
) -> None:
    other = 1 - culprit
    output = survivors(outcomes, 2, str(culprit), scenario)[other]
    assert f"{problem}\n  rank {other} waits in {ROW}\n  rank {culprit} was last seen" in output


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        ("dies", "rank 3 d"),
        ("fails", "rank 3 failed: ZeroDivisionError: the loss scale is 0"),
    ],
)
def test_ranks_that_share_no_group_with_the_culprit_name_it_too(
    outcomes: Outcomes, scenario: str, problem: str
) -> None:
    for rank, output in survivors(outcomes, 4, "3", scenario).items():
        assert f"PeerError: {problem}" in output, output
        assert f"rank {rank} waits in {COLUMN if rank < 2 else ROW}" in output


def test_ranks_that_wait_in_a_circle_say_so(outcomes: Outcomes) -> None:
    for output in survivors(outcomes, 4, "1,2", "turns round").values():
        assert "DeadlockError: no rank can go on: each waits for another" in output
        assert f"rank 0 waits in {ROW}" in output
        assert f"rank 1 waits in {COLUMN}" in output


def test_every_rank_says_which_program_differs(outcomes: Outcomes) -> None:
    for output in outcomes[2, "1", "compiles differently"].outputs:
        assert "MismatchError: rank 1 compiled a different program than rank 0" in output


def test_a_long_computation_is_no_stall(outcomes: Outcomes) -> None:
    ended = outcomes[2, "1", "is slow"]
    assert ended.outputs == ["trained\n"] * 2
    assert ended.codes == [0, 0]


@pytest.mark.parametrize("shared_memory", ["1", "0"])
def test_a_rank_that_is_told_to_stop_while_it_waits_ends_as_soon_as_it_does_not(
    forked: Forked, shared_memory: str
) -> None:
    environment = (("MESHWRIGHT_SHARED_MEMORY", shared_memory),)
    args = ("0,1", "is told to stop")
    ((_, ended),) = forked.run(Ranks("tests.runtime.mishap", 2, args, environment=environment))
    assert ended.codes == [1, 143], ended
    assert "PeerError: rank 1 was told to stop (SIGTERM)\n" in ended.outputs[0]
    assert not ended.outputs[1]


def test_under_torchrun_the_dead_rank_is_named_before_the_others_are_stopped() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*command, "--nproc-per-node", "2", str(MISHAP), "1", "dies"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert f"PeerError: rank 1 died\n  rank 0 waits in {ROW}" in process.stderr

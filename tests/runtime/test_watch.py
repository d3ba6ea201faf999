"""What the other ranks say when one dies, stalls, fails, finishes early or goes its own way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.processes import environment, finish, start

MISHAP = Path(__file__).with_name("mishap.py")
SECONDS = 30.0
"""Start-up on a busy machine included; `quick` measures what follows the mishap."""


def survivors(num_ranks: int, culprits: str, scenario: str) -> dict[int, str]:
    """What every rank but the culprits printed; each has ended by itself, with an error."""
    processes = start(MISHAP, num_ranks, culprits, scenario)
    gone = [int(culprit) for culprit in culprits.split(",")]
    kept = [rank for rank in range(num_ranks) if rank not in gone]
    try:
        outputs = finish([processes[rank] for rank in kept], SECONDS)
        assert all(processes[rank].returncode == 1 for rank in kept), outputs
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return dict(zip(kept, outputs, strict=True))


ROW, COLUMN = "`hidden_sum` (all_reduce over `tp`)", "`loss_sum` (all_reduce over `dp`)"


@pytest.mark.parametrize(
    ("culprit", "scenario", "problem"),
    [
        (1, "dies", "PeerError: rank 1 died"),
        (1, "stands still", "PeerError: rank 1 does not answer: no heartbeat for 2 s"),
        (1, "fails", "PeerError: rank 1 failed: ZeroDivisionError: the loss scale is 0"),
        (1, "finishes", "PeerError: rank 1 has finished while rank 0 waits"),
        (0, "stands still", "PeerError: rank 0, which keeps the store of the run, does not answer"),
        (0, "dies", "PeerError: rank 0, which keeps the store of the run, does not answer"),
        (1, "hangs in a backend", "PeerError: rank 1 does not answer: no heartbeat for 2 s"),
    ],
)
def test_the_other_rank_says_what_happened(culprit: int, scenario: str, problem: str) -> None:
    other = 1 - culprit
    output = survivors(2, str(culprit), scenario)[other]
    assert f"{problem}\n  rank {other} waits in {ROW}\n  rank {culprit} was last seen" in output


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        ("dies", "rank 3 d"),
        ("fails", "rank 3 failed: ZeroDivisionError: the loss scale is 0"),
    ],
)
def test_ranks_that_share_no_group_with_the_culprit_name_it_too(
    scenario: str, problem: str
) -> None:
    for rank, output in survivors(4, "3", scenario).items():
        assert f"PeerError: {problem}" in output, output
        assert f"rank {rank} waits in {COLUMN if rank < 2 else ROW}" in output


def test_ranks_that_wait_in_a_circle_say_so() -> None:
    for output in survivors(4, "1,2", "turns round").values():
        assert "DeadlockError: no rank can go on: each waits for another" in output
        assert f"rank 0 waits in {ROW}" in output
        assert f"rank 1 waits in {COLUMN}" in output


def test_every_rank_says_which_program_differs() -> None:
    processes = start(MISHAP, 2, "1", "compiles differently")
    for output in finish(processes, SECONDS):
        assert "MismatchError: rank 1 compiled a different program than rank 0" in output


def test_a_long_computation_is_no_stall() -> None:
    processes = start(MISHAP, 2, "1", "is slow")
    assert finish(processes, SECONDS) == ["trained\n"] * 2
    assert [process.returncode for process in processes] == [0, 0]


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

"""Shared memory between real processes: its slots, its set-up and its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshwright.runtime.transports.shared import SLOTS, slot_bytes
from tests.runtime.processes import finish, start

SLOTS_SCRIPT = Path(__file__).with_name("slots.py")
SECONDS = 60.0


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_waits_come_in_any_order_and_starts_outnumber_the_slots(num_ranks: int) -> None:
    names = ("backwards", "apart", "ahead", "modes")
    processes = start(SLOTS_SCRIPT, num_ranks, *names)
    for output in finish(processes, SECONDS):
        assert output.split() == list(names), output
    assert [process.returncode for process in processes] == [0] * num_ranks


def test_members_that_ask_for_different_operations_say_so() -> None:
    outputs = finish(start(SLOTS_SCRIPT, 2, "other"), SECONDS)
    problem = "MismatchError: members of a group asked for different operations"
    ours, theirs = "all_reduce of 12 bytes", "all_gather of 12 bytes"
    assert any(
        f"{problem}\n  rank 0: {ours}\n  rank 1: {theirs}" in text for text in outputs
    ) or any(f"{problem}\n  rank 1: {theirs}\n  rank 0: {ours}" in text for text in outputs)


def test_nothing_stays_behind_when_every_rank_is_killed() -> None:
    before = set(os.listdir("/dev/shm"))
    outputs = finish(start(SLOTS_SCRIPT, 2, "killed"), SECONDS)
    assert outputs == ["killed\n"] * 2
    assert not any("meshwright" in name for name in set(os.listdir("/dev/shm")) - before)


@pytest.mark.parametrize("case", ["unwanted", "unable"])
def test_all_members_use_gloo_where_one_does_not_want_shared_memory_or_cannot(case: str) -> None:
    processes = start(SLOTS_SCRIPT, 2, "unshared", case)
    assert finish(processes, SECONDS) == ["unshared\n"] * 2


def test_the_memory_of_a_group_is_bounded_whatever_its_size() -> None:
    assert all(size * SLOTS * slot_bytes(size) <= 32 * 2**20 for size in range(2, 65))

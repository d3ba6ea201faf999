"""Shared memory between real processes: its slots, its set-up and its end."""

from __future__ import annotations

import os

import pytest

from meshwright.runtime.transports.shared import SLOTS, slot_bytes
from tests.runtime.forked import Ended, Forked, Ranks

MODULE = "tests.runtime.transports.slots"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_waits_come_in_any_order_and_starts_outnumber_the_slots(
    forked: Forked, num_ranks: int
) -> None:
    names = ("backwards", "apart", "ahead", "modes")
    for output in forked.outputs(MODULE, num_ranks, *names):
        assert output.split() == list(names), output


def test_members_sleep_while_they_wait_where_one_of_them_has_too_few_cores(forked: Forked) -> None:
    assert forked.outputs(MODULE, 2, "crowded") == ["crowded\n"] * 2


def ended(forked: Forked, case: str) -> Ended:
    """How two ranks end that need not end well."""
    ((_, found),) = forked.run(Ranks(MODULE, 2, (case,)))
    return found


def test_members_that_ask_for_different_operations_say_so(forked: Forked) -> None:
    outputs = ended(forked, "other").outputs
    problem = "MismatchError: members of a group asked for different operations"
    ours, theirs = "all_reduce of 12 bytes", "all_gather of 12 bytes"
    assert any(
        f"{problem}\n  rank 0: {ours}\n  rank 1: {theirs}" in text for text in outputs
    ) or any(f"{problem}\n  rank 1: {theirs}\n  rank 0: {ours}" in text for text in outputs)


def test_nothing_stays_behind_when_every_rank_is_killed(forked: Forked) -> None:
    before = set(os.listdir("/dev/shm"))
    outputs = ended(forked, "killed").outputs
    assert outputs == ["killed\n"] * 2
    assert not any("meshwright" in name for name in set(os.listdir("/dev/shm")) - before)


@pytest.mark.parametrize("case", ["unwanted", "unable"])
def test_all_members_use_gloo_where_one_does_not_want_shared_memory_or_cannot(
    forked: Forked, case: str
) -> None:
    assert forked.outputs(MODULE, 2, "unshared", case) == ["unshared\n"] * 2


def test_the_memory_of_a_group_is_bounded_whatever_its_size() -> None:
    assert all(size * SLOTS * slot_bytes(size) <= 32 * 2**20 for size in range(2, 65))

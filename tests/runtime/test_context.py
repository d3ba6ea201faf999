"""Sequences split over real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.context_ranks import PLANS
from tests.runtime.processes import finish, start


@pytest.mark.slow
def test_split_sequences_train_on_two_processes_as_in_one() -> None:
    processes = start(Path(__file__).parent / "context_ranks.py", 2)
    for output in finish(processes, 120):
        assert [f"{name} done" for name in PLANS] == output.splitlines()[-len(PLANS) :], output

"""Processes that are given different inputs, or hold different values, say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import meshwright as mw
from tests.runtime.models import batch
from tests.runtime.processes import finish, start
from tests.runtime.test_run import compiled

DIFFERENT_INPUTS = Path(__file__).with_name("different_inputs.py")


def test_ranks_with_different_inputs_or_weights_are_told_on_every_rank(
    golden: Callable[[str, str], None],
) -> None:
    processes = start(DIFFERENT_INPUTS, 2)
    first, second = finish(processes, 180)
    golden("different_inputs", first)
    assert first == second
    assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.parametrize("wrong", [-1, "always", 0.5, None])
def test_an_interval_that_is_no_number_of_steps_is_an_error(wrong: object) -> None:
    with pytest.raises(mw.RunError, match="`check_inputs` is"):
        compiled().launch(check_inputs=wrong)


def test_where_every_rank_is_here_there_is_one_batch_and_nothing_to_compare() -> None:
    run = compiled().launch(check_inputs=1)
    assert run.step(*batch()).isfinite()

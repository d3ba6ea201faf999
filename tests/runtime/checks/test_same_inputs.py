"""Processes that are given different inputs, or hold different values, say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import meshwright as mw
from tests.runtime.forked import Forked
from tests.runtime.models import batch
from tests.runtime.test_run import compiled


def test_ranks_with_different_inputs_or_weights_are_told_on_every_rank(
    golden: Callable[[str, str], None], forked: Forked
) -> None:
    first, second = forked.outputs("tests.runtime.checks.different_inputs", 2)
    golden("different_inputs", first)
    assert first == second


@pytest.mark.parametrize("wrong", [-1, "always", 0.5, None])
def test_an_interval_that_is_no_number_of_steps_is_an_error(wrong: object) -> None:
    with pytest.raises(mw.RunError, match="`check_inputs` is"):
        compiled().launch(check_inputs=wrong)


def test_where_every_rank_is_here_there_is_one_batch_and_nothing_to_compare() -> None:
    run = compiled().launch(check_inputs=1)
    assert run.step(*batch()).isfinite()

"""Loads by real processes: from and to the virtual mesh, and with one rank that cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.checkpoint.resuming import go_on
from tests.runtime.checkpoint.test_pairs import PAIRED
from tests.runtime.forked import Forked


def test_what_one_rank_cannot_load_is_an_error_of_all_that_changes_nothing(
    tmp_path: Path, forked: Forked, golden: Callable[[str, str], None]
) -> None:
    module = "tests.runtime.checkpoint.failing_loads"
    first, second = forked.outputs(module, 2, tmp_path / "checkpoint")
    golden("failing_loads", first)
    assert first == second


@pytest.mark.slow
def test_processes_and_the_virtual_mesh_go_on_from_each_others_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Forked
) -> None:
    monkeypatch.chdir(tmp_path)

    def processes(plan: str, num_ranks: int, source: str, target: str, first: str) -> str:
        args = (plan, tmp_path / source, tmp_path / target, first)
        outputs = forked.outputs("tests.runtime.checkpoint.resuming", num_ranks, *args)
        assert outputs == outputs[:1] * num_ranks
        return outputs[0].strip()

    steps = [
        go_on("tensor", "-", "first", 0),
        processes("tensor", 2, "first", "second", "2"),
        processes("both", 4, "second", "third", "4"),
        processes("data", 2, "third", "fourth", "6"),
        processes(PAIRED["zero 3"], 4, "fourth", "fifth", "8"),
        processes("tensor", 2, "fifth", "sixth", "10"),
        go_on("data", "sixth", "seventh", 12),
    ]
    expected = [
        go_on("tensor", f"virtual {first}" if first else "-", f"virtual {first + 2}", first)
        for first in range(0, 14, 2)
    ]
    assert steps == expected

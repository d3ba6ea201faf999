"""Runs at the same time, one after another, and outside the main thread."""

from __future__ import annotations

from tests.runtime.forked import Forked, Ranks


def test_runs_do_not_get_into_each_others_way(forked: Forked) -> None:
    ((_, ended),) = forked.run(Ranks("tests.runtime.several", 2, seconds=120.0))
    assert ended.outputs == ["trained\n"] * 2
    assert ended.codes == [0, 0]

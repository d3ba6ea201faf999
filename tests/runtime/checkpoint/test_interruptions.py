"""Savers that are killed, jobs that share a folder, and ranks that meet or do different things."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.processes import ROOT, environment

HERE = Path(__file__).parent


def output(script: str, *args: object, seconds: float) -> list[str]:
    """What a script that forks ranks and jobs of its own prints; it has ended well."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment() | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("kills", "ranks"),
    [
        (8, 1),
        (4, 2),
        pytest.param(50, 1, marks=pytest.mark.slow),
        pytest.param(50, 2, marks=pytest.mark.slow),
    ],
)
def test_a_folder_whose_saver_is_killed_loads_one_whole_save_and_takes_the_next(
    tmp_path: Path, kills: int, ranks: int
) -> None:
    assert output("kills.py", tmp_path, kills, ranks, seconds=550) == [f"{kills} of {kills} right"]


@pytest.mark.parametrize(
    ("savers", "pairs", "readers", "seconds"),
    [(4, 1, 2, 1), pytest.param(13, 2, 5, 6, marks=pytest.mark.slow)],
)
def test_jobs_save_into_one_folder_and_load_from_it_side_by_side(
    tmp_path: Path, savers: int, pairs: int, readers: int, seconds: int
) -> None:
    counts = (savers, pairs, readers)
    lines = output("side_by_side.py", tmp_path, *counts, seconds, seconds=300)
    assert lines[-1] == "all right"
    assert sum(line.startswith("loaded") for line in lines) == readers


@pytest.mark.slow
def test_a_training_whose_ranks_are_killed_goes_on_to_the_bit(tmp_path: Path) -> None:
    kills = int(os.environ.get("MESHWRIGHT_KILLS", "20"))
    (line,) = output("killed_training.py", tmp_path, kills, seconds=60 + 20 * kills)
    right, count = line.removesuffix(" losses right").split(" of ")
    assert right == count, line


@pytest.mark.slow
def test_ranks_that_meet_or_do_different_things_all_say_so_and_go_on(tmp_path: Path) -> None:
    lines = output("mishaps.py", tmp_path, seconds=300)
    assert lines[-1] == "statuses [0, 0]"
    wrong = [line for line in lines[:-1] if not line.endswith(": right")]
    assert not wrong, "\n".join(wrong)
    assert len(lines) == 1 + 2 * len(set(lines[:-1]))

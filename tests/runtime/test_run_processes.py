"""Runs of real processes compared with the virtual mesh, many cases per start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.forked import Forked

EXPECTED = """\
the mesh `tp=8` has 8 ranks, but {n} processes run
  help: start 8 processes (`torchrun --nproc-per-node 8`), or change the mesh
rank 1 compiled a different program than rank{others}
  help: give every rank the same model, plan, example, backend and versions, and the same \
seeds where the model draws numbers in Python
done
"""


@pytest.mark.parametrize(
    ("num_ranks", "plans", "others"),
    [(2, ("data", "tensor", "sequence"), " 0"), (4, ("both", "zero"), "s 0, 2 and 3")],
)
def test_processes_do_what_the_virtual_mesh_does_and_send_what_the_program_says(
    tmp_path: Path, forked: Forked, num_ranks: int, plans: tuple[str, ...], others: str
) -> None:
    for output in forked.outputs("tests.runtime.same_run", num_ranks, tmp_path, *plans):
        assert output == EXPECTED.format(n=num_ranks, others=others)

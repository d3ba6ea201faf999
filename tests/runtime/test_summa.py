"""Products in blocks on real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.processes import finish, start
from tests.runtime.summa_ranks import PLANS


@pytest.mark.slow
def test_products_in_blocks_train_and_infer_on_four_processes_as_on_one_device() -> None:
    processes = start(Path(__file__).parent / "summa_ranks.py", 4)
    for output in finish(processes, 300):
        assert [f"{name} done" for name in PLANS] == output.splitlines()[-len(PLANS) :], output

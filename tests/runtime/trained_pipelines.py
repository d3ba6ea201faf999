"""One rank of `test_trained_pipelines.py`: pipelines of as many processes as there are."""

from __future__ import annotations

import os

import torch

from tests.equivalence import check_equal
from tests.models import tokens
from tests.runtime.pipelines import Tied, plan_of

CASES = {
    2: [
        ("1f1b", 1, 2, 4, "alone"),
        ("zbv", 2, 4, 4, "alone"),
    ],
    4: [
        ("zb", 1, 4, 8, "alone"),
        ("gpipe", 1, 2, 4, "tensor"),
        ("interleaved", 2, 4, 8, "data"),
        ("zbv", 2, 4, 4, "zero 2"),
        ("dualpipev", 2, 4, 8, "zero 3"),
    ],
}
"""By the number of processes: schedules as in `plan_of`."""


def main() -> None:
    torch.set_num_threads(1)
    for case in CASES[int(os.environ["WORLD_SIZE"])]:
        torch.manual_seed(0)
        check_equal(Tied(case[2]), lambda: tokens(12, 16, 4), plan_of(*case), steps=10)
    print("done")


if __name__ == "__main__":
    main()

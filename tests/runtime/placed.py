"""Run by every process of a test: the experts of a model are placed on two ranks.

A small Mixtral trains as on one device; so does a model that sends all rows to one rank, with zero
levels and checkpoints.
"""

from __future__ import annotations

import torch

from tests.equivalence import check_equal, without_grouped
from tests.passes.experts.dense import batch
from tests.passes.experts.stacked import Model, biased, skewed
from tests.test_equivalence_huggingface import BY_EP, MIXTRAL, TOLERANCE, text

PLACED = "mesh ep=2\ndata x, labels over ep\nexperts blocks.*.experts over ep\n"


def main() -> None:
    torch.manual_seed(0)
    plan = "mesh ep=2\n" + BY_EP
    check_equal(MIXTRAL(), text, plan, tolerance=TOLERANCE, copied=without_grouped)
    check_equal(skewed(3), lambda: batch(8, 6), PLACED + "zero 2 over ep\n")
    check_equal(Model(2, body=biased), lambda: batch(8, 6), PLACED + "checkpoint blocks.*\n")
    print("done")


if __name__ == "__main__":
    main()

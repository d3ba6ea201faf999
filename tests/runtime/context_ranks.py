"""Run by every process of a test: sequences are split over two ranks, and train as in one."""

from __future__ import annotations

import copy

import torch

import meshwright
from tests.equivalence import Comparison, check_trained
from tests.models import Gpt, tokens

PLANS = {
    "zigzag": "mesh cp=2\ncontext blocks.* over cp order=zigzag\n",
    "contiguous": "mesh cp=2\ncontext blocks.* over cp order=contiguous\n",
    "ulysses": "mesh cp=2\ncontext blocks.* over cp method=ulysses\ncheckpoint blocks.*\n",
}


def main() -> None:
    for name, plan in PLANS.items():
        torch.manual_seed(0)
        model, batches = Gpt().double(), [tokens() for _ in range(2)]
        program = meshwright.compile(model, meshwright.Plan.parse(plan), batches[0])
        check_trained(program, copy.deepcopy(model), batches, compare=Comparison(1e-10))
        print(f"{name} done")


if __name__ == "__main__":
    main()

"""Run by every process of a test: products in blocks over four ranks train and infer as whole."""

from __future__ import annotations

import copy

import torch

import meshwright
from tests.equivalence import Comparison, check_trained
from tests.models import Gpt, tokens

FUSED = "summa blocks.*.qkv over {0} as (3 heads hd) {1}\n"
GRID = "summa ** over (row, col) {0}\n" + FUSED.format("(row, col)", "{0}")
CUBE = "summa ** over (x, y, z)\n" + FUSED.format("(x, y, z)", "")
PLANS = {
    "2 x 2": "mesh row=2, col=2\n" + GRID.format(""),
    "2 x 2, again": "mesh row=2, col=2\ncheckpoint blocks.*\n" + GRID.format(""),
    "1 x 4": "mesh row=1, col=4\n" + GRID.format(""),
    "two deep, 2 x 1": "mesh z=2, row=2, col=1\n" + GRID.format("depth=z"),
    "two deep, 1 x 2": "mesh z=2, row=1, col=2\n" + GRID.format("depth=z"),
    "1 x 2 x 2": "mesh x=1, y=2, z=2\n" + CUBE,
    "2 x 1 x 2": "mesh x=2, y=1, z=2\n" + CUBE,
    "2 x 2 x 1": "mesh x=2, y=2, z=1\n" + CUBE,
}


def main() -> None:
    for name, text in PLANS.items():
        torch.manual_seed(0)
        model, batches = Gpt(vocab=47).double(), [tokens(47) for _ in range(2)]
        plan, reference = meshwright.Plan.parse(text), copy.deepcopy(model)
        program = meshwright.compile(model, plan, batches[0])
        check_trained(program, reference, batches, compare=Comparison(1e-10))
        trained = copy.deepcopy(reference).eval()
        inference = meshwright.compile(trained, plan, batches[0], mode="infer").launch()
        expected = reference(*batches[0]).detach()
        found = inference.forward(*batches[0])
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        print(f"{name} done")


if __name__ == "__main__":
    main()

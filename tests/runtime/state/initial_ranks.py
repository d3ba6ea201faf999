"""Run by both processes of a test: ranks with and without values start together."""

from __future__ import annotations

import os
import warnings

import torch
from torch import nn

import meshwright as mw
from tests.runtime.state.test_initial import TOKENS, Words, on_meta

BATCH = TOKENS, TOKENS.flip(0)
PLAN = mw.Plan.parse("mesh dp=2\ndata x, y over dp\nzero 3 over dp")


def launched(model: nn.Module, seed: int) -> mw.Run:
    run: mw.Run = mw.compile(model.double(), PLAN, BATCH, device="cpu").launch(seed=seed)
    return run


class Other(Words):
    def init_weights(self) -> None:
        super().init_weights()
        nn.init.constant_(self.odd.bias, int(os.environ["RANK"]))


def main() -> None:
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    with launched(on_meta(Words), seed=3 + rank) as run:
        for name, value in run.state_dict().items():
            print("meta", name, repr(value.sum().item()))
        run.check()
    torch.manual_seed(rank)
    for first in (True, False):
        mine = Words() if first == (rank == 0) else on_meta(Words)
        with launched(mine, seed=3) as run:
            print("rank 0 has values" if first else "rank 1 has values", run.step(*BATCH).item())
            print("odd", run.state_dict()["odd.weight"].sum().item())
            run.check()
    try:
        launched(on_meta(Other), seed=3)
    except mw.RunError as error:
        print(error.problem)

"""What updates in chunks take is tried out once for chunks that are alike."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.compiler.program import Update
from meshwright.runtime.optimizers import chunks, equal_chunks

PLAN = "mesh dp=2\ndata x over dp\nzero 1 over dp\noffload "


class Chain(nn.Module):
    """Layers that are equal, among them one that is not."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [32, 32, 32, 96, 32, 32, 32]
        self.layers = nn.Sequential(*(nn.Linear(n, m) for n, m in pairwise(sizes)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


def updates(plan: str, kind: Any, **options: Any) -> dict[int, Update]:
    program = mw.compile(Chain(), mw.Plan.parse(PLAN + plan), (torch.zeros(4, 32),))
    return program.updates_of(kind, (), options)


@pytest.mark.parametrize("rest", ["", "\nprecision bf16 master=bf16", " to=disk path={path}"])
def test_equal_chunks_take_what_each_of_them_does(
    rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    plan = "parameters" + rest.format(path=f'"{tmp_path}"')
    kinds = [(torch.optim.AdamW, {}), (torch.optim.Adam, {"foreach": True})]
    kinds += [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {})]
    found = [updates(plan, kind, **options) for kind, options in kinds]
    assert found[0][0].elsewhere
    every = chunks.Chunks._update
    monkeypatch.setattr(equal_chunks.EqualChunks, "_update", every)
    assert found == [updates(plan, kind, **options) for kind, options in kinds]


def test_two_of_the_chunks_that_are_alike_are_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    made = list[str]()
    adopt = chunks.Chunks._adopt
    monkeypatch.setattr(
        *(chunks.Chunks, "_adopt"), lambda own, away: made.append(away.name) or adopt(own, away)
    )
    updates("optimizer", torch.optim.AdamW)
    weights = [f"layers.{i}.weight" for i in range(6)]
    # All are adopted as the chunks are made; then, in each update, those that it updates.
    assert made[:6] == weights
    assert set(made[6:]) == {weights[i] for i in (0, 1, 2, 3)}

"""Tiles cover a tensor once, and what a rank reads is little more than what it needs."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.runtime.checkpoint import shards
from meshwright.runtime.checkpoint.files import read_all
from meshwright.runtime.checkpoint.tiles import Tiles


def needed_of(shape: tuple[int, ...], dice: random.Random) -> list[torch.Tensor]:
    """Some indices along each dim."""
    return [torch.tensor(sorted(dice.sample(range(n), dice.randint(1, n)))) for n in shape]


def test_runs_of_bytes_are_those_of_the_tiles_that_are_touched() -> None:
    dice = random.Random(0)
    for _ in range(200):
        shape = tuple(dice.choice([1, 2, 3, 5, 17, 40, 96]) for _ in range(dice.randrange(4)))
        tiles, needed = Tiles(shape, 8), needed_of(shape, dice)
        touched = tiles.touched(needed)
        tensor = torch.zeros(shape, dtype=torch.float64)
        for _, place in tiles.places(touched):
            blocks = zip(place, tiles.blocks, strict=True)
            tensor[tuple(slice(i * block, (i + 1) * block) for i, block in blocks)] += 1
        for begin, end in tiles.runs(touched):
            tensor.view(-1)[begin // 8 : end // 8] -= 1
        assert not tensor.any()
        assert len(tiles.digests(tensor)) == len(tiles)


@pytest.mark.parametrize(
    ("shape", "counts"),
    [((), []), ((0, 4), [1, 1]), ((16,), [1]), ((64, 32), [4, 4]), ((4096, 4096), [48, 24]),
     ((1 << 20,), [48]), ((8, 64, 64), [4, 4, 4]), ((3, 5), [1, 1])],
)  # fmt: skip
def test_tiles_are_as_many_as_their_digests_are_worth(
    shape: tuple[int, ...], counts: list[int]
) -> None:
    tiles = Tiles(shape, 8)
    assert tiles.counts == counts
    assert len(tiles) <= max(1, math.prod(shape) * 8 // 1024)


def test_a_damaged_tile_is_found_by_who_reads_it_and_by_nobody_else(tmp_path: Path) -> None:
    tensor = torch.randn(64, 32, dtype=torch.float64)
    path = shards.shard_path(tmp_path, 0)
    header = shards.Header.of("f" * 32, 0, {"w": tensor})
    with shards.create_file(path) as file:
        digest = shards.write_shard(file, path, header, {"w": tensor})
    _, size, header_digest = shards.read_header(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    opened = shards.Shards(tmp_path, "f" * 32, [shards.Shard(size, header_digest, digest)])
    rows = [torch.arange(48), torch.arange(32)]
    assert torch.equal(opened.part(0, "w", (64, 32), tensor.dtype, rows)[:48], tensor[:48])
    columns = [torch.arange(64), torch.arange(24)]
    found = opened.part(0, "w", (64, 32), tensor.dtype, columns)
    assert torch.equal(found[:, :24], tensor[:, :24])
    last = [torch.tensor([63]), torch.tensor([31])]
    for needed in (None, last):
        with pytest.raises(mw.RunError, match=r"`w` in .* is damaged"):
            opened.part(0, "w", (64, 32), tensor.dtype, needed)


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(128, 256, bias=False)
        self.down = torch.nn.Linear(256, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()).sum()


WIDE = {
    "data": "mesh dp=4\ndata x over dp",
    "tensor": "mesh tp=4\ncolumns up over tp\nrows down over tp",
    "zero": "mesh dp=4\ndata x over dp\nzero 3 over dp",
    "one": "mesh dp=1",
}


@pytest.mark.parametrize("source", WIDE)
@pytest.mark.parametrize("target", WIDE)
def test_a_rank_reads_the_bytes_that_it_holds_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str
) -> None:
    counted = 0

    def counting(file: Any, wanted: memoryview) -> Any:
        nonlocal counted
        counted += len(wanted)
        return read_all(file, wanted)

    runs = {
        plan: mw.compile(Wide(), mw.Plan.parse(WIDE[plan]), (torch.ones(4, 128),)).launch()
        for plan in {source, target}
    }
    run, optimizer = runs[source], runs[source].optimizer(torch.optim.AdamW)
    run.step(torch.ones(4, 128))
    optimizer.step()
    run.save(tmp_path, optimizer)
    run = runs[target]
    theirs = run.optimizer(torch.optim.AdamW)
    monkeypatch.setattr(shards, "read_all", counting)
    run.load(tmp_path, theirs)
    held = [tensor for state in run.states for tensor in state.tensors.values()]
    held += [tensor for kept in theirs.state.values() for tensor in kept.values()]
    assert counted == sum(tensor.nbytes for tensor in held)

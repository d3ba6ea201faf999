"""Indexing, read and written, of split activations and of split parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.equivalence import check_equal
from tests.models import real

Indexed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of an activation `h[b, s, d]`, a table `w[v, d]` and indices `i[b, s]`."""

_ORDER = torch.tensor([2, 0, 3, 3])
"""An index that repeats, and leaves one out."""


def _rows(i: Tensor) -> Tensor:
    return torch.arange(i.shape[0])[:, None]


def _across(i: Tensor) -> Tensor:
    return i[..., None].expand(-1, -1, 4)


def _relative() -> Tensor:
    """The table of a relative-position bias."""
    return (torch.arange(4)[:, None] - torch.arange(4) + 2).clamp(0, 5)


READS: dict[str, Indexed] = {
    "a table by an index": lambda h, w, i: h + w[i],
    "a negative index": lambda h, w, i: h + w[i - 4],
    "several indices": lambda h, w, i: h + w[i, i][..., None],
    "the last dim": lambda h, w, i: h + w[:, i].sum(0)[..., None],
    "indices that broadcast": lambda h, w, i: h + w[i[:, :1], _ORDER][:, None],
    "an index among slices": lambda h, w, i: h[:, _ORDER, 1:] + w[None, 1, :3],
    "the split dim": lambda h, w, i: h[..., _ORDER],
    "two dims at once": lambda h, w, i: h[:, _ORDER, _ORDER],
    "the batch": lambda h, w, i: h[i[:, 0]],
    "a row of each": lambda h, w, i: h[_rows(i)[:, 0], i[:, 0]],
    "rows of each": lambda h, w, i: h[_rows(i), i],
    "all rows": lambda h, w, i: h.reshape(-1, 4)[i.flatten()],
    "relative positions": lambda h, w, i: h @ w[_relative()].sum(0),
    "gather over the batch": lambda h, w, i: h.gather(0, _across(i)),
    "gather over the sequence": lambda h, w, i: h.gather(1, _across(i)),
    "gather along": lambda h, w, i: torch.take_along_dim(h, h.argsort(-1), -1),
    "take": lambda h, w, i: torch.take(w, i)[..., None] * h,
    "index_select": lambda h, w, i: h + w.index_select(0, i.flatten()).view_as(h),
    "nothing": lambda h, w, i: h * (1 + w[_ORDER[:0]].sum()),
}
WRITES: dict[str, Indexed] = {
    "rows of each": lambda h, w, i: torch.zeros_like(h).index_put((_rows(i), i), h, True),
    "rows into another": lambda h, w, i: h.index_put((_rows(i), i), h.cos(), True),
    "index_add over the batch": lambda h, w, i: torch.zeros_like(h).index_add(0, i[:, 0], h),
    "index_add over the sequence": lambda h, w, i: torch.zeros_like(h).index_add(1, _ORDER, h),
    "index_add over features": lambda h, w, i: torch.zeros_like(h).index_add(2, _ORDER, h),
    "index_add to a value": lambda h, w, i: h.index_add(1, _ORDER, h.cos(), alpha=0.5),
    "a graph's edges": lambda h, w, i: torch.zeros(6, 4, dtype=h.dtype).index_add(
        0, i.flatten(), h.reshape(-1, 4)
    ),
    "the largest of a graph's edges": lambda h, w, i: torch.zeros(
        6, 4, dtype=h.dtype
    ).scatter_reduce(0, i.flatten()[:, None].expand(-1, 4), h.reshape(-1, 4), "amax"),
    "scatter_add over the batch": lambda h, w, i: torch.zeros_like(h).scatter_add(0, _across(i), h),
    "scatter_add over features": lambda h, w, i: torch.zeros_like(h).scatter_add(2, _across(i), h),
    "a pointer's copies": lambda h, w, i: (
        (h @ w.T).softmax(-1).scatter_add(2, i[:, None].expand(-1, 4, -1), h.softmax(-1))
    ),
    "scatter": lambda h, w, i: torch.zeros_like(h).scatter(2, i[..., None], h[..., :1]),
    "scattered means": lambda h, w, i: h.new_zeros(6, 4, 4).scatter_reduce(
        1, _across(i), h, "mean", include_self=False
    ),
    "index_copy": lambda h, w, i: h.index_copy(1, _ORDER[:3], h[:, :3].cos()),
    "index_copy into a table": lambda h, w, i: h + w.index_copy(0, _ORDER[:3], w[:3].cos())[:4],
    "index_fill": lambda h, w, i: h.index_fill(2, _ORDER, 0.5),
    "index_fill with a parameter": lambda h, w, i: h.index_fill(1, _ORDER, w[0, 0]),
    "select_scatter": lambda h, w, i: h.select_scatter(h[..., 0].cos(), 2, 1),
    "slice_scatter": lambda h, w, i: h.slice_scatter(h[..., :2].cos(), 2, 0, 4, 2),
    "modes of a spectrum": lambda h, w, i: _filtered(h, slice(0, 2)),
    "one mode of a spectrum": lambda h, w, i: _filtered(h, 1),
    "diagonal_scatter": lambda h, w, i: h.diagonal_scatter(h[..., 0].cos(), 0, 1, 2),
    "masked_scatter": lambda h, w, i: h.masked_scatter(i[..., None] > 1, h.cos()),
    "put": lambda h, w, i: h.put(_ORDER, h.flatten()[:4].cos(), accumulate=True),
}


def _filtered(h: Tensor, modes: int | slice) -> Tensor:
    """Torch differentiates such a write in place, and not the operator that it is captured as."""
    spectrum = torch.fft.rfft(h, dim=1)
    filtered = spectrum.clone()
    filtered[:, modes] = spectrum[:, modes] * spectrum[:, modes]
    return torch.fft.irfft(filtered, n=4, dim=1)


class Looked(nn.Module):
    """Each way to index, of one activation and a table of its own."""

    def __init__(self, ways: dict[str, Indexed]) -> None:
        super().__init__()
        self.ways, self.mid = ways, nn.Linear(4, 4)
        self.tables = nn.ParameterList(torch.randn(6, 4) for _ in ways)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = torch.tanh(self.mid(x))
        found = [way(h, w, i).sin() for way, w in zip(self.ways.values(), self.tables, strict=True)]
        weights = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y) for y in found]
        return torch.stack([(y * w).mean() for y, w in zip(found, weights, strict=True)]).sum()


DATA = "data x, i over dp\n"
PLANS = {
    "data": f"mesh dp=3\n{DATA}",
    "data and tensor": f"mesh dp=2, tp=2\n{DATA}columns mid over tp\n",
    "rows of tables": f"mesh dp=2, tp=2\n{DATA}shard tables.* [v@tp, d]\n",
    "columns of tables": f"mesh dp=2, tp=2\n{DATA}shard tables.* [v, d@tp]\n",
    "sequence": f"mesh dp=2, tp=2\n{DATA}shard mid -> [b@dp, s@tp, d]\n",
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("ways", [READS, WRITES], ids=["reads", "writes"])
def test_indexing_equals_eager(ways: dict[str, Indexed], plan: str) -> None:
    torch.manual_seed(0)
    check_equal(Looked(ways), lambda: (real(6, 4, 4), torch.randint(0, 4, (6, 4))), PLANS[plan])


class Memory(nn.Module):
    """Slots that each token writes one of, read as a codebook with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.tables = nn.Linear(4, 4), nn.ParameterList([torch.randn(6, 4)])

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h, table = self.mid(x), self.tables[0]
        slots, rows = table.expand(len(x), 6, 4).clone(), torch.arange(len(x))
        for token in range(3):
            slots[rows, i[:, token]] = h[:, token] + slots[rows, i[:, token]].tanh()
        nearest = table[torch.cdist(h.reshape(-1, 4), table).argmin(-1)].view_as(h)
        straight = h + (nearest - h).detach()
        return (
            slots.square().mean() + (nearest - h.detach()).square().mean() + straight.sin().mean()
        )


@pytest.mark.parametrize("plan", ["data", "rows of tables", "columns of tables"])
def test_a_memory_and_a_codebook_equal_eager(plan: str) -> None:
    torch.manual_seed(0)
    check_equal(Memory(), lambda: (real(6, 4, 4), torch.randint(0, 4, (6, 4))), PLANS[plan])

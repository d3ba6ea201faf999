"""The pass `lookups`: what counts along a dim is no lookup, so that a batch stays split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.passes.rewriting import lookups
from tests.equivalence import check_equal, implicit_gathers
from tests.models import real
from tests.passes.stages import check_documented, shown, stages

Looked = Callable[[Tensor, Tensor, Tensor], Tensor]


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Linear(16, 16)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        return self.mid(x)[torch.arange(x.shape[0]), last].square().mean()


def test_the_docstring_shows_the_last_of_each_row_before_and_after() -> None:
    example = (torch.randn(8, 4, 16), torch.randint(0, 4, (8,)))
    found = stages(Last(), example, "mesh dp=2\ndata x, last over dp\n")
    check_documented(
        lookups,
        shown(found["captured"], "arange", "index"),
        shown(found["lookups"], "view", "expand", "gather", "view_1"),
    )


def _rows(i: Tensor) -> Tensor:
    return torch.arange(i.shape[0])[:, None]


def _bag(w: Tensor, i: Tensor, **options: object) -> Tensor:
    return F.embedding_bag(i, w, **options)[:, None]  # type: ignore[arg-type]


LOCAL: dict[str, Looked] = {
    "one of each": lambda h, w, i: h[_rows(i)[:, 0], i[:, 0]],
    "some of each": lambda h, w, i: h[_rows(i), i - 4],
    "a column of each": lambda h, w, i: h[_rows(i)[:, 0], :, i[:, 1]],
    "one of each, cut": lambda h, w, i: h[_rows(i)[:, 0], i[:, 0], 1:],
    "two counted": lambda h, w, i: h[_rows(i), torch.arange(4), i],
    "written": lambda h, w, i: torch.zeros_like(h).index_put((_rows(i), i), h),
    "added": lambda h, w, i: h.index_put((_rows(i), i), h.cos(), accumulate=True),
    "one written": lambda h, w, i: h.index_put((_rows(i)[:, 0], i[:, 0]), w[0]),
    "along": lambda h, w, i: torch.take_along_dim(h, i[..., None], 1),
    "along, from the end": lambda h, w, i: torch.take_along_dim(h, i[..., None] - 3, 1),
    "taken": lambda h, w, i: torch.take(w, i)[..., None] * h,
    "bags summed": lambda h, w, i: h + _bag(w, i, mode="sum", padding_idx=1),
    "bags averaged": lambda h, w, i: h + _bag(w, i, mode="mean", padding_idx=1),
    "largest of bags": lambda h, w, i: h + _bag(w, i, mode="max"),
    "weighted bags": lambda h, w, i: (
        h + _bag(w, i, mode="sum", per_sample_weights=h[..., 0].contiguous())
    ),
    "scattered means": lambda h, w, i: h.scatter_reduce(1, i[..., None] + 0 * h.long(), h, "mean"),
    "graph": lambda h, w, i: torch.zeros(4, 4, dtype=h.dtype).scatter_reduce(
        0, i.flatten()[:, None].expand(-1, 4), h.reshape(-1, 4), "mean", include_self=False
    ),
}


class Local(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Linear(4, 4)
        self.tables = nn.ParameterList(torch.randn(6, 4) for _ in LOCAL)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h = torch.tanh(self.mid(x))
        found = [look(h, w, i).sin() for look, w in zip(LOCAL.values(), self.tables, strict=True)]
        return torch.stack([(y * y.detach().cos()).mean() for y in found]).sum()


@pytest.mark.parametrize(
    "plan",
    [
        "mesh dp=3\ndata x, i over dp\n",
        "mesh dp=2, tp=2\ndata x, i over dp\nshard tables.* [v@tp, d]\n",
    ],
)
def test_lookups_within_a_row_of_the_batch_gather_nothing(plan: str) -> None:
    torch.manual_seed(0)
    program = check_equal(Local(), lambda: (real(6, 4, 4), torch.randint(0, 4, (6, 4))), plan)
    assert not [each for each in implicit_gathers(program) if "@dp" in each]

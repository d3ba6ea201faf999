"""Rows to their owners and back, on one rank."""

from __future__ import annotations

import pytest
import torch

from meshwright.compiler.kernels import owners
from meshwright.compiler.kernels.grouped import grouped_mm, grouped_mm_weight

GROUP = torch.tensor([[[3, 0], [6, 5], [2, 4], [1, 0]]])
"""Of six groups and three owners; one row has a group that nobody owns."""


@pytest.mark.parametrize("shared", [True, False])
def test_rows_are_sorted_by_owner_and_come_back(shared: bool) -> None:
    x = torch.randn(1, 4, 2, 5)
    x = x[:, :, :1].expand_as(x) if shared else x
    order = owners.owner_order(GROUP, 6, 3)
    rows = owners.by_owner(x[:, :, 0] if shared else x, order)
    # Owner 0 has groups 0 and 1, and so on; of one owner, rows stay in their order.
    expected = [(0, 1), (3, 0), (3, 1), (0, 0), (2, 0), (1, 1), (2, 1), (1, 0)]
    assert torch.equal(rows, torch.stack([x[0, s, t] for s, t in expected]))
    assert torch.equal(owners.in_order(rows, order, GROUP), x)
    assert owners.owner_counts(GROUP, 6, 3).tolist() == [[[3, 2, 2]]]


def test_an_owner_takes_its_own_rows_and_gives_zeros_for_others() -> None:
    x = torch.randn(1, 4, 2, 5)
    taken = owners.to_owners(x, GROUP, 6, 3, 4, 1, 2)
    assert torch.equal(taken[0, 0, :2], torch.stack([x[0, 0, 0], x[0, 2, 0]]))
    assert torch.equal(taken[0, 1, :2], torch.stack([x[0, 1, 1], x[0, 2, 1]]))
    assert not taken[:, :, 2:].any()
    numbers = owners.owned_groups(GROUP, 6, 3, 4, 1, 2)
    assert numbers.tolist() == [[[1, 0, 2, 2], [1, 0, 2, 2]]]
    own = ((GROUP >= 2) & (GROUP < 6)).unsqueeze(-1)
    assert torch.equal(owners.from_owners(taken, GROUP, 6, 3, 1), x * own)


def test_more_rows_than_the_maximum_are_an_error_with_what_would_do() -> None:
    x = torch.randn(1, 4, 2, 5)
    owners.to_owners(x, GROUP, 6, 3, 2, 1, 2)
    with pytest.raises(RuntimeError, match=r"3 rows go to the experts of one rank, .* for 2"):
        owners.to_owners(x, GROUP, 6, 3, 2, 0, 1)


def test_products_in_blocks_are_those_of_each_block() -> None:
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(3, 2, 5, 6)
    group = torch.randint(0, 3, (2, 3, 4))
    y, total = grouped_mm(x, weight, group), torch.zeros(3, 2, 5, 6)
    grad = torch.randn(2, 3, 4, 6)
    for g, q, m in torch.ones(2, 3, 4).nonzero().tolist():
        e = int(group[g, q, m])
        wanted = x[g, q, m] @ weight[q, e] if e < 2 else torch.zeros(6)
        torch.testing.assert_close(y[g, q, m], wanted)
        if e < 2:
            total[q, e] += x[g, q, m].unsqueeze(1) * grad[g, q, m]
    torch.testing.assert_close(grouped_mm_weight(x, grad, group, 2), total)

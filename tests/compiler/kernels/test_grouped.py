"""Products of rows with the matrices of their groups."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from meshwright.compiler.kernels import products
from meshwright.compiler.kernels.grouped import grouped_mm, grouped_mm_weight
from tests.compiler.placing.rules import references
from tests.models import real

GROUPS = [
    [[2, 0], [2, 1], [4, 0]],
    [[3, 3, 3]] * 2,
    [[4], [4]],
    [[0, 1, 1, 2, 3, 4]],
]


def turned(x: Tensor) -> Tensor:
    """The same values in another order in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("form", [torch.clone, turned])
def test_each_row_meets_the_matrix_of_its_group(groups: list[list[int]], form: object) -> None:
    assert callable(form)
    group = torch.tensor(groups)
    x, weight = form(real(len(group), 3)), form(real(4, 3, 5))
    torch.testing.assert_close(
        grouped_mm(x, weight, group), references.grouped_mm(x, weight, group)
    )


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("form", [torch.clone, turned])
def test_rows_add_up_by_group(groups: list[list[int]], form: object) -> None:
    assert callable(form)
    group = torch.tensor(groups)
    x, grad = form(real(len(group), 3)), form(real(*group.shape, 5))
    expected = references.grouped_mm_weight(x, grad, group, 5)[:4]
    torch.testing.assert_close(grouped_mm_weight(x, grad, group, 4), expected)


def test_no_rows_give_no_rows_and_zero_matrices() -> None:
    none = torch.empty(0, 2, dtype=torch.int64)
    assert grouped_mm(real(0, 3), real(4, 3, 5), none).shape == (0, 2, 5)
    assert not grouped_mm_weight(real(0, 3), real(0, 2, 5), none, 4).any()


@pytest.mark.parametrize("faster", [True, False])
def test_large_groups_may_be_products_of_onednn(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of many rows, one of a few, one of none and rows of no group."""
    monkeypatch.setattr(products, "is_faster", lambda _: faster)
    onednn = mock.Mock(wraps=products.mm)
    monkeypatch.setattr(products, "mm", onednn)
    group = torch.cat([torch.full((n, 1), e) for e, n in enumerate((300, 3, 0, 5))])
    x, weight = real(308, 1, 96).float(), real(3, 96, 128).float()
    found, expected = (f(x, weight, group) for f in (grouped_mm, references.grouped_mm))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    weights = (f(x, found, group, 4) for f in (grouped_mm_weight, references.grouped_mm_weight))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-2)
    assert onednn.call_count == (2 if faster else 0)

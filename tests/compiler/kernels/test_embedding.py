"""Embedding lookup and its gradient, whole and split by rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.compiler.kernels.embedding import (
    add_embedding_backward,
    embedding,
    embedding_backward,
)

ROWS, WIDTH = 12, 5


def _example() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    index = torch.randint(0, ROWS, (3, 7))
    index[0, :3] = 4
    return weight, index, torch.randn(3, 7, WIDTH, dtype=torch.float64)


def _reference_grad(weight: Tensor, index: Tensor, grad: Tensor, padding: int) -> Tensor:
    leaf = weight.clone().requires_grad_()
    padding_idx = None if padding < 0 else padding
    F.embedding(index, leaf, padding_idx=padding_idx).backward(grad)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_lookups_of_row_shards_sum_to_the_whole_lookup(ranks: int) -> None:
    weight, index, _ = _example()
    parts = weight.chunk(ranks)
    found = sum(
        embedding(part, index, num_rows=ROWS, offset=rank * len(part))
        for rank, part in enumerate(parts)
    )
    torch.testing.assert_close(found, F.embedding(index, weight))


def test_a_whole_table_is_a_plain_lookup() -> None:
    weight, index, _ = _example()
    torch.testing.assert_close(embedding(weight, index, num_rows=ROWS), F.embedding(index, weight))
    with pytest.raises(IndexError):
        embedding(weight, torch.tensor([ROWS]), num_rows=ROWS)


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_an_index_that_no_rank_has_is_an_error(wrong: int) -> None:
    weight, index, _ = _example()
    index.view(-1)[-1] = wrong
    for rank, part in enumerate(weight.chunk(2)):
        with pytest.raises(RuntimeError, match=f"the table has {ROWS} rows"):
            embedding(part, index, num_rows=ROWS, offset=rank * len(part))


def test_a_nan_row_held_here_does_not_leak_into_rows_held_elsewhere() -> None:
    weight = torch.full((2, WIDTH), torch.nan)
    assert not embedding(weight, torch.tensor([5, 9]), num_rows=10, offset=2).any()


@pytest.mark.parametrize("padding", [-1, 0, 4, 11])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_of_row_shards_concatenate_to_the_whole_gradient(
    ranks: int, padding: int
) -> None:
    weight, index, grad = _example()
    expected = _reference_grad(weight, index, grad, padding)
    local = ROWS // ranks
    found = []
    for rank in range(ranks):
        offset = rank * local if ranks > 1 else -1
        options = {"num_rows": local, "offset": offset, "padding_idx": padding}
        found.append(embedding_backward(grad, index, **options))
    torch.testing.assert_close(torch.cat(found), expected)


@pytest.mark.parametrize("padding", [-1, 4])
@pytest.mark.parametrize("offset", [-1, 3])
def test_a_gradient_is_added_to_a_total_as_it_is_made_alone(offset: int, padding: int) -> None:
    _, index, grad = _example()
    grad[2, 1] = torch.nan if offset == 3 else 1
    index[2, 1] = 0
    total = torch.randn(ROWS - max(offset, 0), WIDTH, dtype=torch.float64)
    where = {"offset": offset, "padding_idx": padding}
    expected = total + embedding_backward(grad, index, num_rows=len(total), **where)
    found = add_embedding_backward(total, grad, index, **where)
    assert found is total
    torch.testing.assert_close(found, expected)

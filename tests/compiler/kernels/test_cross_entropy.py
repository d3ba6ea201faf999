"""Cross entropy by rows against torch's own in float64, whole and split by classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.compiler.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_combine,
    cross_entropy_stats,
)

ROWS, CLASSES, IGNORED = 13, 11, -100


def _example(ignored: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, dtype=torch.float64) * 4
    target = torch.randint(0, CLASSES, (ROWS,))
    target[:ignored] = IGNORED
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.1
    return logits, target, weight, torch.randn(ROWS, dtype=torch.float64)


def _padded(logits: Tensor, ranks: int, content: float) -> tuple[Tensor, ...]:
    columns = -(-logits.shape[1] // ranks) * ranks
    if ranks == 4:
        columns += 4  # the last rank then has a single class, or none
    return F.pad(logits, (0, columns - logits.shape[1]), value=content).chunk(ranks, 1)


def _reference(
    logits: Tensor, target: Tensor, grad: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = F.cross_entropy(leaf, target, reduction="none", **options)
    loss.backward(grad)
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def _split(
    shards: tuple[Tensor, ...], target: Tensor, grad: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient as the ranks compute them, their columns concatenated."""
    width = shards[0].shape[1]
    offsets = [rank * width for rank in range(len(shards))]
    stats = torch.stack(
        [
            cross_entropy_stats(shard, target, offset=offset, **options)
            for shard, offset in zip(shards, offsets, strict=True)
        ]
    )
    loss, lse = cross_entropy_combine(stats, target, **options)
    grads = [
        cross_entropy_backward(shard, target, lse, grad, offset=offset, **options)
        for shard, offset in zip(shards, offsets, strict=True)
    ]
    return loss, torch.cat(grads, 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("content", [0.0, 1e30, -torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_split_classes_with_padding_of_any_content_equal_torch(
    ranks: int, content: float, smoothing: float, weighted: bool
) -> None:
    logits, target, weight, grad = _example()
    options = {"label_smoothing": smoothing, "weight": weight if weighted else None}
    loss, dlogits = _reference(logits, target, grad, **options)
    shards = _padded(logits, ranks, content)
    got, dgot = _split(shards, target, grad, num_classes=CLASSES, **options)
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(dgot[:, :CLASSES], dlogits)
    assert not dgot[:, CLASSES:].any()


@pytest.mark.parametrize("ignored", [0, ROWS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_ignored_all_or_none_have_no_loss_and_no_gradient(
    ignored: int, smoothing: float
) -> None:
    logits, target, _, grad = _example(ignored)
    expected, dexpected = _reference(logits, target, grad, label_smoothing=smoothing)
    loss, lse = cross_entropy(logits, target, label_smoothing=smoothing, num_classes=CLASSES)
    dlogits = cross_entropy_backward(
        logits, target, lse, grad, num_classes=CLASSES, label_smoothing=smoothing
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(lse, logits.logsumexp(1))
    torch.testing.assert_close(dlogits, dexpected)


def test_an_ignore_index_that_is_a_class_ignores_that_class() -> None:
    logits, target, _, grad = _example(0)
    ignore = int(target[0])
    loss, dlogits = _reference(logits, target, grad, ignore_index=ignore)
    shards = _padded(logits, 2, 0.0)
    got, dgot = _split(shards, target, grad, num_classes=CLASSES, ignore_index=ignore)
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(dgot[:, :CLASSES], dlogits)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_columns_masked_with_minus_infinity_stay_finite(ranks: int) -> None:
    logits, target, _, grad = _example()
    logits[:, :6] = -torch.inf
    target = target.clamp(min=7)
    loss, dlogits = _reference(logits, target, grad)
    got, dgot = _split(_padded(logits, ranks, 0.0), target, grad, num_classes=CLASSES)
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(dgot[:, :CLASSES], dlogits)


def test_the_weighted_mean_is_the_sum_over_the_sum_of_row_weights() -> None:
    logits, target, weight, _ = _example()
    for given in (None, weight):
        loss, _ = cross_entropy(
            logits, target, weight=given, label_smoothing=0.1, num_classes=CLASSES
        )
        ones = torch.ones_like(weight) if given is None else given
        rows = ones[target[target != IGNORED]]
        expected = F.cross_entropy(logits, target, weight=given, label_smoothing=0.1)
        torch.testing.assert_close(loss.sum() / rows.sum(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_half_types_are_computed_in_float32(dtype: torch.dtype, ranks: int) -> None:
    logits, target, _, grad = _example()
    logits = logits.to(dtype)
    expected, dexpected = _reference(logits.double(), target, grad)
    shards = _padded(logits, ranks, 0.0)
    loss, dlogits = _split(shards, target, grad.float(), num_classes=CLASSES)
    assert loss.dtype == torch.float32
    assert dlogits.dtype == dtype
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-5)
    accuracy = torch.finfo(dtype).eps
    torch.testing.assert_close(
        dlogits[:, :CLASSES].double(), dexpected, rtol=accuracy, atol=2 * accuracy
    )


def test_the_gradient_may_overwrite_the_logits() -> None:
    logits, target, _, grad = _example()
    for ranks in (1, 2):
        shard = _padded(logits, ranks, 0.0)[0].contiguous()
        _, lse = cross_entropy(logits, target, num_classes=CLASSES)
        expected = cross_entropy_backward(shard, target, lse, grad, num_classes=CLASSES)
        got = cross_entropy_backward(shard, target, lse, grad, num_classes=CLASSES, out=shard)
        assert got is shard
        torch.testing.assert_close(got, expected)


def test_many_rows_go_through_multiple_blocks() -> None:
    torch.manual_seed(0)
    logits = torch.randn(301, 1021, dtype=torch.float64)
    target = torch.randint(0, 1021, (301,))
    grad = torch.randn(301, dtype=torch.float64)
    loss, dlogits = _reference(logits, target, grad, label_smoothing=0.1)
    for ranks in (1, 2):
        got, dgot = _split(
            _padded(logits, ranks, 0.0), target, grad, num_classes=1021, label_smoothing=0.1
        )
        torch.testing.assert_close(got, loss)
        torch.testing.assert_close(dgot[:, :1021], dlogits)


def test_a_target_that_is_not_a_class_is_an_error() -> None:
    logits, target, _, _ = _example()
    target[5] = CLASSES
    with pytest.raises(IndexError, match=f"target {CLASSES} is not one of {CLASSES} classes"):
        cross_entropy_stats(logits[:, :6], target, num_classes=CLASSES)

"""Every kernel gives the same shapes, types and strides on fake tensors as on real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from meshwright.compiler.kernels.attention import attention, attention_backward
from meshwright.compiler.kernels.cross_entropy import (
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_stats,
)
from meshwright.compiler.kernels.dropout import RandomIndex, dropout
from meshwright.compiler.kernels.embedding import embedding, embedding_backward
from meshwright.compiler.kernels.norm import (
    layer_norm,
    layer_norm_backward,
    norm_backward_sums,
    norm_combine,
    norm_stats,
    rms_norm,
    rms_norm_backward,
)


def _describe(results: Any) -> list[tuple[Any, ...]]:
    """Shapes, types, and the strides of dims with more than one element."""
    return [
        (tuple(x.shape), x.dtype, [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1])
        for x in tree_leaves(results)
        if x is not None
    ]


def _embedding(x: Tensor, index: Tensor) -> Any:
    weight = x[0]
    out = embedding(weight, index, offset=3)
    return out, embedding_backward(out, index, weight.shape[0], offset=3, padding_idx=1)


def _cross_entropy(x: Tensor, index: Tensor) -> Any:
    logits, target = x.flatten(0, 1), index.flatten()
    loss, lse = cross_entropy(logits, target, label_smoothing=0.1)
    grad = cross_entropy_backward(logits, target, lse, loss, num_classes=8)
    return loss, lse, grad, cross_entropy_stats(logits, target, num_classes=16, offset=8)


def _norm(x: Tensor, index: Tensor) -> Any:
    weight = x[0, 0]
    y, mean, rstd = layer_norm(x, weight, weight, 1e-5)
    whole = layer_norm_backward(y, x, mean, rstd, weight, weight)
    z, scale = rms_norm(x, weight, 1e-5)
    mean, rstd = norm_combine(norm_stats(x).unsqueeze(0), 8, 1e-5)
    sums = norm_backward_sums(y, x, mean, rstd, weight)
    return y, whole, z, scale, rms_norm_backward(z, x, scale, weight), mean, rstd, sums


def _dropout(x: Tensor, index: Tensor) -> Any:
    return dropout(x, 0.1, RandomIndex(1, 2, 3, (3, 5, 8), (0, 0, 0)))


def _attention(dropout_p: float) -> Callable[[Tensor, Tensor], Any]:
    def run(x: Tensor, index: Tensor) -> Any:
        q = x.unsqueeze(0)
        random = RandomIndex(1, 2, 3, (1, 3, 5, 5), (0, 0, 0, 0))
        out, lse = attention(q, q, q, dropout_p=dropout_p, index=random)
        grads = attention_backward(out, q, q, q, out, lse, dropout_p=dropout_p, index=random)
        return out, lse, grads

    return run


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "run",
    [_embedding, _cross_entropy, _norm, _dropout, _attention(0.0), _attention(0.1)],
    ids=["embedding", "cross_entropy", "norm", "dropout", "attention", "attention_dropout"],
)
def test_fake_results_look_like_real_ones(
    run: Callable[[Tensor, Tensor], Any], dtype: torch.dtype
) -> None:
    x = torch.randn(3, 5, 8).to(dtype)
    index = torch.randint(0, 5, (3, 5))
    expected = _describe(run(x, index))
    with FakeTensorMode() as mode:
        found = _describe(run(mode.from_tensor(x), mode.from_tensor(index)))
    assert found == expected

"""Every kernel gives the same shapes, types and strides on fake tensors as on real ones.

Fake CUDA tensors too: a program for GPUs is compiled where there are none. Indexing them with
brackets fails there, so kernels use methods until they know that they have data.
"""

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
    cross_entropy_combine,
    cross_entropy_stats,
)
from meshwright.compiler.kernels.dropout import dropout
from meshwright.compiler.kernels.embedding import embedding, embedding_backward
from meshwright.compiler.kernels.hashing import RandomIndex
from meshwright.compiler.kernels.norm import (
    layer_norm,
    layer_norm_backward,
    norm_apply,
    norm_backward_apply,
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
    weight = x.select(0, 0)
    out = embedding(weight, index, num_rows=99, offset=3)
    return out, embedding_backward(out, index, num_rows=5, offset=3, padding_idx=1)


def _cross_entropy(x: Tensor, index: Tensor) -> Any:
    logits, target = x.flatten(0, 1), index.flatten()
    loss, lse = cross_entropy(logits, target, num_classes=8, label_smoothing=0.1)
    grad = cross_entropy_backward(logits, target, lse, loss, num_classes=8)
    stats = cross_entropy_stats(
        logits, target, num_classes=16, offset=8, label_smoothing=0.1, weight=None
    )
    both = torch.stack([stats, stats])
    combined = cross_entropy_combine(both, target, num_classes=16, label_smoothing=0.1)
    return loss, lse, grad, stats, combined


def _norm(x: Tensor, index: Tensor) -> Any:
    weight = x.select(0, 0).select(0, 0)
    y, mean, rstd = layer_norm(x, weight, weight, 1e-5)
    whole = layer_norm_backward(y, x, mean, rstd, weight, x.dtype)
    z, scale = rms_norm(x, weight, 1e-5)
    mean, rstd = norm_combine(norm_stats(x).unsqueeze(0), 8, 1e-5)
    sums = norm_backward_sums(y, x, mean, rstd, weight)
    applied = norm_apply(x, mean, rstd, weight, weight)
    split = norm_backward_apply(sums, applied, x, mean, rstd, weight, n=8, bias_dtype=x.dtype)
    return y, whole, z, scale, rms_norm_backward(z, x, scale, weight), mean, rstd, sums, split


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


RUNS = [_embedding, _cross_entropy, _norm, _dropout]


@pytest.mark.parametrize("run", RUNS)
def test_fake_cuda_tensors_need_no_cuda(run: Callable[[Tensor, Tensor], Any]) -> None:
    x, index = torch.randn(3, 5, 8), torch.randint(0, 5, (3, 5))
    expected = _describe(run(x, index))
    with FakeTensorMode():
        found = run(
            torch.empty(3, 5, 8, device="cuda"),
            torch.empty(3, 5, dtype=torch.int64, device="cuda"),
        )
    assert {leaf.device.type for leaf in tree_leaves(found) if leaf is not None} == {"cuda"}
    assert _describe(found) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_attention_on_fake_cuda_tensors_needs_no_cuda(
    dtype: torch.dtype, kv_heads: int, biased: bool, dropout_p: float
) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 8, 33, 64, dtype=dtype, device="cuda")
        k = torch.empty(2, kv_heads, 33, 64, dtype=dtype, device="cuda")
        bias = torch.empty(1, 8, 33, 33, dtype=dtype, device="cuda") if biased else None
        index = RandomIndex(1, 2, 3, (2, 8, 33, 33), (0, 0, 0, 0))
        drop: dict[str, Any] = {"dropout_p": dropout_p, "index": index}
        out, lse = attention(q, k, k, bias, **drop)
        grads = attention_backward(out, q, k, k, out, lse, bias, need_bias_grad=biased, **drop)
    assert out.shape == q.shape
    shapes = [None if grad is None else grad.shape for grad in grads]
    assert shapes == [q.shape, k.shape, k.shape, bias.shape if bias is not None else None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "run",
    [*RUNS, _attention(0.0), _attention(0.1)],
    ids=[*(run.__name__ for run in RUNS), "attention", "attention_dropout"],
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

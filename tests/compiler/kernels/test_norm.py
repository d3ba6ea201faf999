"""Layer norm and RMS norm against torch's own in float64, whole and split."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode

from meshwright.compiler.kernels import norm
from meshwright.compiler.kernels.norm import (
    layer_norm,
    layer_norm_backward,
    norm_apply,
    norm_backward_apply,
    norm_backward_sums,
    norm_combine,
    norm_stats,
    rms_combine,
    rms_norm,
    rms_norm_backward,
    rms_stats,
)

EPS = 1e-5
SHAPE = (3, 37, 24)


def _example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(SHAPE, dtype=dtype) * 2 + 3
    weight, bias = (torch.randn(SHAPE[-1], dtype=dtype) for _ in range(2))
    return x, weight, bias, torch.randn(SHAPE, dtype=dtype)


def _reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor, rms: bool
) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    given = iter(leaves)
    x, weight, bias = (None if t is None else next(given) for t in (x, weight, bias))
    size = x.shape[-1:]
    y = F.rms_norm(x, size, weight, EPS) if rms else F.layer_norm(x, size, weight, bias, EPS)
    y.backward(grad)
    return y.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
def test_whole_layer_norm_equals_torch(affine: tuple[bool, bool]) -> None:
    x, weight, bias, grad = _example()
    w, b = (t if used else None for t, used in zip((weight, bias), affine, strict=True))
    expected, grads = _reference(x, w, b, grad, rms=False)
    y, mean, rstd = layer_norm(x, w, b, EPS)
    assert mean.shape == rstd.shape == SHAPE[:-1]
    torch.testing.assert_close(y, expected)
    found = layer_norm_backward(grad, x, mean, rstd, w, b if b is None else b.dtype)
    got = [t for t in found if t is not None]
    torch.testing.assert_close(got, grads)


@pytest.mark.parametrize("affine", [True, False])
def test_whole_rms_norm_equals_torch(affine: bool) -> None:
    x, weight, _, grad = _example()
    w = weight if affine else None
    expected, grads = _reference(x, w, None, grad, rms=True)
    y, rstd = rms_norm(x, w, EPS)
    torch.testing.assert_close(y, expected)
    got = [t for t in rms_norm_backward(grad, x, rstd, w) if t is not None]
    torch.testing.assert_close(got, grads)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_split_norm_equals_torch(ranks: int, affine: bool, rms: bool) -> None:
    x, weight, bias, grad = _example()
    w, b = (weight, None if rms else bias) if affine else (None, None)
    expected, grads = _reference(x, w, b, grad, rms=rms)
    n = SHAPE[-1]
    xs, gs = x.chunk(ranks, -1), grad.chunk(ranks, -1)
    ws, bs = ([None] * ranks if t is None else t.chunk(ranks) for t in (w, b))
    if rms:
        mean, rstd = None, rms_combine(torch.stack([rms_stats(part) for part in xs]), n, EPS)
    else:
        stats = torch.stack([norm_stats(part) for part in xs])
        mean, rstd = norm_combine(stats, n // ranks, EPS)
    ys = [norm_apply(xs[i], mean, rstd, ws[i], bs[i]) for i in range(ranks)]
    torch.testing.assert_close(torch.cat(ys, -1), expected)
    sums = torch.stack(
        [norm_backward_sums(gs[i], xs[i], mean, rstd, ws[i]) for i in range(ranks)]
    ).sum(0)
    options = {"n": n, "bias_dtype": b if b is None else b.dtype}
    parts = [
        norm_backward_apply(sums, gs[i], xs[i], mean, rstd, ws[i], **options) for i in range(ranks)
    ]
    got = [torch.cat(found, -1) for found in zip(*parts, strict=True) if found[0] is not None]
    torch.testing.assert_close(got, grads)


def test_a_large_mean_costs_no_digits() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 1024) + 1000
    stats = torch.stack([norm_stats(part) for part in x.chunk(4, 1)])
    mean, rstd = norm_combine(stats, 256, 0.0)
    var = x.double().var(1, correction=0)
    torch.testing.assert_close(rstd.double(), var.rsqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_accurate_to_their_own_precision(dtype: torch.dtype) -> None:
    x, weight, bias, grad = _example(dtype)
    wide = [t.double() for t in (x, weight, bias, grad)]
    accuracy = 4 * torch.finfo(dtype).eps
    expected, grads = _reference(wide[0], wide[1], None, wide[3], rms=True)
    y, rstd = rms_norm(x, weight, EPS)
    got = rms_norm_backward(grad, x, rstd, weight)
    for found, wanted in zip((y, *got), (expected, *grads), strict=True):
        assert found is not None
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=accuracy, atol=accuracy)
    stats = torch.stack([norm_stats(part) for part in x.chunk(2, -1)])
    mean, rstd = norm_combine(stats, SHAPE[-1] // 2, EPS)
    y = norm_apply(x, mean, rstd, weight, bias)
    expected, _ = _reference(*wide, rms=False)
    torch.testing.assert_close(y.double(), expected, rtol=accuracy, atol=accuracy)


def test_the_gradient_of_a_bias_has_its_own_type() -> None:
    x, _, bias, grad = _example(torch.bfloat16)
    _, mean, rstd = layer_norm(x, None, bias.float(), EPS)
    sums = norm_backward_sums(grad, x, mean, rstd, None)
    _, dweight, dbias = norm_backward_apply(
        sums, grad, x, mean, rstd, None, n=SHAPE[-1], bias_dtype=torch.float32
    )
    assert dweight is None
    torch.testing.assert_close(dbias, grad.sum((0, 1), dtype=torch.float32))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_kernels_of_a_gpu_are_given_what_they_take(
    affine: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has them as separate operators for a CPU: one in itself, one in its tables."""
    aten = torch.ops.aten
    backward = decomposition_table[aten._fused_rms_norm_backward.default]
    x, weight, _, grad = _example(dtype)
    given = weight if affine else None
    wanted = rms_norm(x, given, EPS)
    grads = rms_norm_backward(grad, x, wanted[1], given)
    monkeypatch.setattr(norm, "_has_kernel", lambda x, weight: True)
    monkeypatch.setattr(aten, "_fused_rms_norm_backward", backward)
    found = rms_norm(x, given, EPS)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(rms_norm_backward(grad, x, found[1], given), grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_the_kernels_of_a_gpu_are_for_operands_of_one_type() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(4, 8, device="cuda"), torch.empty(8, device="cuda")
        assert norm._has_kernel(x, weight) and norm._has_kernel(x, None)
        assert not norm._has_kernel(x.bfloat16(), weight)
        assert not norm._has_kernel(torch.empty(4, 8), None)

"""Attention and its gradients against torch's own in float64, fused and exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshwright.compiler.kernels import blocks
from meshwright.compiler.kernels.attention import attention, attention_backward
from meshwright.compiler.kernels.dropout import keep_scale
from meshwright.compiler.kernels.hashing import RandomIndex

BATCH, HEADS, WIDTH = 2, 4, 8


def _operands(
    s: int = 5, t: int = 7, kv_heads: int = HEADS, v_width: int = WIDTH
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(BATCH, HEADS, s, WIDTH, dtype=torch.float64)
    k = torch.randn(BATCH, kv_heads, t, WIDTH, dtype=torch.float64)
    v = torch.randn(BATCH, kv_heads, t, v_width, dtype=torch.float64)
    return q, k, v, torch.randn(BATCH, HEADS, s, v_width, dtype=torch.float64)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias: Tensor | None, **options: Any
) -> list[Tensor]:
    """Output and gradients of q, k, v and a floating bias."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    if bias is not None and bias.is_floating_point():
        bias = bias.clone().requires_grad_()
        leaves.append(bias)
    out = F.scaled_dot_product_attention(
        *leaves[:3], attn_mask=bias, enable_gqa=q.dim() > 3, **options
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _ours(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    need_bias_grad: bool = False,
    **options: Any,
) -> list[Tensor]:
    out, lse = attention(q, k, v, bias, **options)
    grads = attention_backward(
        grad, q, k, v, out, lse, bias, need_bias_grad=need_bias_grad, **options
    )
    return [x for x in (out, *grads) if x is not None]


@pytest.fixture(params=["one block", "many blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the exact form in blocks of few rows too."""
    if request.param == "many blocks":
        from meshwright.compiler.kernels import attention_math

        monkeypatch.setattr(blocks, "CPU_BLOCK", 16)
        monkeypatch.setattr(attention_math, "_FEWEST_ROWS", 2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("s", "t"), [(5, 7), (7, 5), (6, 6), (1, 9)])
@pytest.mark.parametrize("v_width", [WIDTH, 3])  # 3: no fused kernel
@pytest.mark.usefixtures("block_size")
def test_attention_without_bias_equals_torch(
    kv_heads: int, causal: bool, s: int, t: int, v_width: int
) -> None:
    operands = _operands(s, t, kv_heads, v_width)
    options = {"is_causal": causal, "scale": 0.3}
    torch.testing.assert_close(
        _ours(*operands, None, **options), _reference(*operands, None, **options)
    )


BIASES = [(5, 7), (1, 1, 5, 7), (2, 1, 5, 7), (1, 4, 5, 7), (2, 4, 5, 7), (2, 1, 1, 7), (4, 1, 7)]


@pytest.mark.parametrize("shape", [*BIASES, (7,), (1, 1, 5, 1), (1,)])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("need_bias_grad", [False, True])
@pytest.mark.usefixtures("block_size")
def test_a_bias_of_any_broadcast_and_its_gradient_equal_torch(
    shape: tuple[int, ...], kv_heads: int, need_bias_grad: bool
) -> None:
    operands = _operands(kv_heads=kv_heads)
    bias = torch.randn(shape, dtype=torch.float64)
    expected = _reference(*operands, bias)
    got = _ours(*operands, bias, need_bias_grad=need_bias_grad)
    torch.testing.assert_close(got, expected[: len(got)])
    assert len(got) == 4 + need_bias_grad


@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("as_bool", [False, True])
@pytest.mark.parametrize("v_width", [WIDTH, 3])
@pytest.mark.usefixtures("block_size")
def test_rows_that_see_no_key_are_zero_as_in_torch(
    shape: tuple[int, ...], as_bool: bool, v_width: int
) -> None:
    operands = _operands(v_width=v_width)
    bias = torch.rand(shape) < 0.6
    bias[..., 0, :] = False
    if not as_bool:
        bias = torch.zeros(shape, dtype=torch.float64).masked_fill(~bias, -torch.inf)
    expected = _reference(*operands, bias)[:4]
    got = _ours(*operands, bias)
    assert all(x.isfinite().all() for x in got)
    assert not got[0][..., 0, :].any()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("need_bias_grad", [False, True])
def test_a_causal_mask_and_a_bias_add_up(need_bias_grad: bool) -> None:
    operands = _operands()
    bias = torch.randn(1, HEADS, 5, 7, dtype=torch.float64)
    mask = torch.ones(5, 7, dtype=torch.bool).tril()
    expected = _reference(*operands, bias.masked_fill(~mask, -torch.inf))
    got = _ours(*operands, bias, is_causal=True, need_bias_grad=need_bias_grad)
    torch.testing.assert_close(got, expected[: len(got)])


@pytest.mark.parametrize("dims", [2, 3, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_other_ranks_equal_torch(dims: int, biased: bool) -> None:
    lead = (2, 3, 4)[5 - dims :]
    torch.manual_seed(0)
    q, grad = (torch.randn(*lead, 5, WIDTH, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(*lead, 7, WIDTH, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(*lead[:1], *(1,) * (dims - 3), 5, 7, dtype=torch.float64)
    expected = _reference(q, k, v, grad, bias if biased else None)
    got = _ours(q, k, v, grad, bias if biased else None, need_bias_grad=biased)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v_width", [WIDTH, 3])
def test_narrow_types_are_accurate_to_their_own_precision(dtype: torch.dtype, v_width: int) -> None:
    operands = [x.to(dtype) for x in _operands(kv_heads=2, v_width=v_width)]
    expected = _reference(*(x.double() for x in operands), None)
    got = _ours(*operands, None)
    assert {x.dtype for x in got} == {dtype}
    accuracy = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close([x.double() for x in got], expected, rtol=accuracy, atol=accuracy)


def test_heads_cut_from_a_fused_projection_need_no_copy() -> None:
    fused = torch.randn(BATCH, 6, 3, HEADS, WIDTH, dtype=torch.float64)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    grad = torch.ones((), dtype=torch.float64).expand(q.shape)
    torch.testing.assert_close(_ours(q, k, v, grad, None), _reference(q, k, v, grad, None))
    turned = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(_ours(turned, k, v, grad, None), _ours(q, k, v, grad, None))


def _dropped(kept: Tensor) -> Callable[..., Tensor]:
    def apply(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = q @ k.mT / WIDTH**0.5 + bias
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) * kept) @ v

    return apply


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.usefixtures("block_size")
def test_dropout_acts_on_the_weights_by_global_position(causal: bool, kv_heads: int) -> None:
    q, k, v, grad = _operands(kv_heads=kv_heads)
    bias = torch.randn(1, HEADS, 5, 7, dtype=torch.float64)
    shape = (BATCH, HEADS, 5, 7)
    index = RandomIndex(1, 2, 3, shape, (0, 0, 0, 0))
    kept = keep_scale(shape, 0.4, index, torch.float64, q.device)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    out = _dropped(kept)(*leaves, causal)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    options = {"is_causal": causal, "dropout_p": 0.4, "index": index}
    got = _ours(q, k, v, grad, bias, need_bias_grad=True, **options)
    torch.testing.assert_close(got, expected)


def test_dropout_of_split_batch_and_heads_is_the_slice_of_the_whole() -> None:
    q, k, v, grad = _operands(s=6, t=6)
    shape = (BATCH, HEADS, 6, 6)
    whole = _ours(
        q, k, v, grad, None, dropout_p=0.4, index=RandomIndex(1, 2, 3, shape, (0, 0, 0, 0))
    )
    heads = torch.tensor([1, 3])
    part = [x[1:, heads] for x in (q, k, v, grad)]
    index = RandomIndex(1, 2, 3, shape, (1, heads, 0, 0))
    local = _ours(*part, None, dropout_p=0.4, index=index)
    torch.testing.assert_close(local, [x[1:, heads] for x in whole])

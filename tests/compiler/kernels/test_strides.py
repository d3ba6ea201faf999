"""Every kernel gives the same numbers whatever the strides of its operands.

Each operand in turn, then all together, is laid out in memory in every way that slicing, permuting
and expanding can leave it; the results are compared with those of contiguous operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
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
    rms_combine,
    rms_norm,
    rms_norm_backward,
    rms_stats,
)
from tests.compiler.strides import expanded, strided

Run = Callable[..., Any]


def check_strides(run: Run, *operands: Tensor | None) -> None:
    """Assert that `run` gives the same for every layout of its operands."""
    tensors = {i: x for i, x in enumerate(operands) if x is not None}
    for kind in (strided, expanded):
        ways = {i: list(kind(x)) for i, x in tensors.items()}
        for i, found in ways.items():
            for name, x in found:
                _check_equal(run, [*operands[:i], x, *operands[i + 1 :]], f"operand {i} {name}")
        for number in range(min(map(len, ways.values()))):
            chosen = [ways[i][number][1] if i in ways else None for i in range(len(operands))]
            _check_equal(run, chosen, f"all operands, way {number}")


def _check_equal(run: Run, given: Sequence[Tensor | None], name: str) -> None:
    before = [None if x is None else x.clone() for x in given]
    dense = [None if x is None else x.clone(memory_format=torch.contiguous_format) for x in given]
    expected, found = tree_leaves(run(*dense)), tree_leaves(run(*given))
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            ours, theirs, equal_nan=True, msg=lambda text, n=number: f"{name}, result {n}: {text}"
        )
    for x, old in zip(given, before, strict=True):
        assert x is None or old is None or x.equal(old), f"{name}: an operand was overwritten"


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _index(shape: tuple[int, ...]) -> RandomIndex:
    return RandomIndex(1, 2, 3, shape, (0,) * len(shape))


ROWS, CLASSES = 6, 5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("offset", "num_classes"), [(0, CLASSES), (0, 4), (3, 9), (3, 7), (9, 9)])
def test_cross_entropy(smoothing: float, offset: int, num_classes: int) -> None:
    options: dict[str, Any] = {"num_classes": num_classes, "label_smoothing": smoothing}

    def run(logits: Tensor, target: Tensor, grad: Tensor, weight: Tensor | None) -> Any:
        stats = cross_entropy_stats(logits, target, offset=offset, weight=weight, **options)
        both = torch.stack([stats, stats]).transpose(1, 2).contiguous().transpose(1, 2)
        loss, lse = cross_entropy_combine(both, target, weight=weight, **options)
        dlogits = cross_entropy_backward(
            logits, target, lse, grad, offset=offset, weight=weight, **options
        )
        found = [stats, loss, lse, dlogits]
        if not offset:
            found += cross_entropy(logits, target, weight=weight, **options)
        return found

    target, grad = torch.randint(0, num_classes, (ROWS,)), _random(ROWS)
    target[2] = -100
    for weight in (None, torch.rand(num_classes, dtype=torch.float64)):
        check_strides(run, _random(ROWS, CLASSES), target, grad, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_cross_entropy_of_other_types_and_sizes(rows: int, dtype: torch.dtype) -> None:
    def run(logits: Tensor, target: Tensor) -> Any:
        loss, lse = cross_entropy(logits, target, num_classes=CLASSES)
        return loss, cross_entropy_backward(logits, target, lse, loss, num_classes=CLASSES)

    target = torch.randint(0, CLASSES, (rows,))
    check_strides(run, _random(rows, CLASSES).to(dtype), target)


def test_cross_entropy_writes_its_gradient_where_it_is_told() -> None:
    logits, target, grad = _random(ROWS, CLASSES), torch.randint(0, CLASSES, (ROWS,)), _random(ROWS)
    _, lse = cross_entropy(logits, target, num_classes=CLASSES)
    expected = cross_entropy_backward(logits, target, lse, grad, num_classes=CLASSES)
    for name, out in strided(torch.zeros_like(logits)):
        given = cross_entropy_backward(logits, target, lse, grad, num_classes=CLASSES, out=out)
        torch.testing.assert_close(given, expected, msg=name)
        assert given is out
    for name, own in list(strided(logits.clone()))[1:]:
        given = cross_entropy_backward(own, target, lse, grad, num_classes=CLASSES, out=own)
        torch.testing.assert_close(given, expected, msg=name)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 4), (3, 1), (0, 4), (4,)])
def test_layer_norm(shape: tuple[int, ...]) -> None:
    def run(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> Any:
        y, mean, rstd = layer_norm(x, weight, bias, 1e-3)
        return y, mean, rstd, layer_norm_backward(grad, x, mean, rstd, weight, bias.dtype)

    check_strides(run, _random(*shape), _random(*shape), _random(shape[-1]), _random(shape[-1]))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 4), (3, 1), (0, 4), (4,)])
def test_split_norm(shape: tuple[int, ...]) -> None:
    def run(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> Any:
        n = 2 * shape[-1]
        mean, rstd = norm_combine(torch.stack([norm_stats(x), norm_stats(grad)]), n // 2, 1e-3)
        sums = norm_backward_sums(grad, x, mean, rstd, weight)
        options = {"n": n, "bias_dtype": bias.dtype}
        grads = norm_backward_apply(sums, grad, x, mean, rstd, weight, **options)
        return mean, rstd, norm_apply(x, mean, rstd, weight, bias), sums, grads

    check_strides(run, _random(*shape), _random(*shape), _random(shape[-1]), _random(shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 4), (3, 1), (0, 4), (4,)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def run(x: Tensor, grad: Tensor, weight: Tensor | None) -> Any:
        y, rstd = rms_norm(x, weight, 1e-3)
        split = rms_combine(rms_stats(x).unsqueeze(0), shape[-1], 1e-3)
        return y, rstd, split, rms_norm_backward(grad, x, rstd, weight)

    for weight in (None, _random(shape[-1]).to(dtype)):
        check_strides(run, _random(*shape).to(dtype), _random(*shape).to(dtype), weight)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 4), (0, 4), (5,), ()])
def test_dropout(shape: tuple[int, ...]) -> None:
    check_strides(lambda x: dropout(x, 0.3, _index(shape)), _random(*shape))


@pytest.mark.parametrize("offset", [-1, 2])
@pytest.mark.parametrize("padding_idx", [-1, 4])
def test_embedding(offset: int, padding_idx: int) -> None:
    def run(weight: Tensor, index: Tensor, grad: Tensor) -> Any:
        found = embedding(weight, index, num_rows=99, offset=offset)
        options = {"num_rows": 6, "offset": offset, "padding_idx": padding_idx}
        return found, embedding_backward(grad, index, **options)

    for rows in (0, 1, 3):
        index = torch.randint(0, 6, (rows, 4))
        check_strides(run, _random(6, 5), index, _random(rows, 4, 5))


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "dropped": {"dropout_p": 0.2, "index": _index((2, 4, 3, 3))},
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention(name: str, width: int, heads: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Any:
        out, lse = attention(q, k, v, **ATTENTION[name])
        return out, lse, attention_backward(grad, q, k, v, out, lse, **ATTENTION[name])

    q, kv = _random(2, 4, 3, width), (_random(2, heads, 3, width) for _ in range(2))
    check_strides(run, q, *kv, _random(2, 4, 3, width))


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (1, 1, 3, 3), (2, 1, 1, 3), (3, 3)])
@pytest.mark.parametrize("kind", [torch.float64, torch.bool])
def test_attention_with_a_bias(shape: tuple[int, ...], kind: torch.dtype) -> None:
    wanted = kind == torch.float64

    def run(q: Tensor, bias: Tensor, grad: Tensor) -> Any:
        out, lse = attention(q, q, q, bias)
        return out, lse, attention_backward(grad, q, q, q, out, lse, bias, need_bias_grad=wanted)

    bias = _random(*shape) if wanted else torch.rand(*shape) > 0.3
    check_strides(run, _random(2, 4, 3, 2), bias, _random(2, 4, 3, 2))


def test_the_saved_output_of_attention_may_have_any_strides() -> None:
    q, grad = _random(2, 4, 3, 8), _random(2, 4, 3, 8)
    out, lse = attention(q, q, q)

    def run(out: Tensor, lse: Tensor) -> Any:
        return attention_backward(grad, q, q, q, out, lse)

    for place, saved in enumerate((out, lse)):
        for name, given in strided(saved):
            pair = (given, lse) if place == 0 else (out, given)
            for ours, theirs in zip(run(*pair)[:3], run(out, lse)[:3], strict=True):
                torch.testing.assert_close(ours, theirs, msg=f"{place} {name}")

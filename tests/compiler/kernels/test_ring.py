"""Attention block by block, as the ranks of a ring compute it, against all keys at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.compiler.kernels.attention import attention, attention_backward
from meshwright.compiler.kernels.hashing import RandomIndex
from meshwright.compiler.kernels.ring import (
    Block,
    Part,
    all_of,
    ring_backward,
    ring_forward,
    sees,
    tiles,
)

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 16, 8


def _operands(groups: int = HEADS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((HEADS, WIDTH), (groups, WIDTH), (groups, 6), (HEADS, 6))
    return [torch.randn(BATCH, h, LENGTH, d, dtype=torch.float64).to(dtype) for h, d in shapes]


def _whole(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, bias: Tensor | None, **options: Any
) -> list[Tensor]:
    learned = bias is not None and bias.is_floating_point()
    out, lse = attention(q, k, v, bias, **options)
    grads = attention_backward(grad, q, k, v, out, lse, bias, need_bias_grad=learned, **options)
    return [x for x in (out, *grads) if x is not None]


class Ring:
    """The ranks of a ring, one after the other."""

    def __init__(
        self,
        operands: list[Tensor],
        bias: Tensor | None,
        ranks: int,
        is_causal: bool,
        order: str = "contiguous",
        **options: Any,
    ) -> None:
        self.q, self.k, self.v, self.grad = operands
        self.bias, self.ranks, self.is_causal, self.options = bias, ranks, is_causal, options
        self.length, self.part = LENGTH // ranks, Part(LENGTH, ranks, order)

    def run(self) -> list[Tensor]:
        """Output and gradients, as `_whole` gives them."""
        outs, dqs, dbiases = [], [], []
        sums = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            for x in (self.k, self.v)
        ]
        for here in range(self.ranks):
            out, lse = self._forward(here)
            dq, dbias = self._backward(here, out, lse, sums)
            outs.append(out)
            dqs.append(dq)
            dbiases += [] if dbias is None else [dbias]
        found = [torch.cat(outs, 2), torch.cat(dqs, 2), *sums]
        if self.bias is None or not dbiases:
            return found
        return [
            *found,
            torch.cat(dbiases, 2) if self.bias.shape[2] > 1 else torch.stack(dbiases).sum(0),
        ]

    def _forward(self, here: int) -> tuple[Tensor, Tensor]:
        out = lse = None
        for step in range(self.ranks):
            there = (here - step) % self.ranks
            out, lse = ring_forward(
                self._own(self.q, here), self._own(self.k, there), self._own(self.v, there),
                self._rows(here), out, lse,
                block=self._block(here, there), last=step == self.ranks - 1,
            )  # fmt: skip
        assert out is not None and lse is not None
        return out, lse

    def _backward(
        self, here: int, out: Tensor, lse: Tensor, sums: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        learned = self.bias is not None and self.bias.is_floating_point()
        dq, total = None, None
        for step in range(self.ranks):
            there = (here - step) % self.ranks
            dq, dk, dv, dbias = ring_backward(
                self._own(self.grad, here), self._own(self.q, here), self._own(self.k, there),
                self._own(self.v, there), out, lse, self._rows(here), dq,
                block=self._block(here, there), need_bias_grad=learned,
            )  # fmt: skip
            for sum, own in zip(sums, (dk, dv), strict=True):
                self._own(sum, there).add_(own)
            if dbias is not None:
                total = dbias if total is None else total + dbias
        assert dq is not None
        return dq, total

    def _own(self, x: Tensor, rank: int) -> Tensor:
        return x[:, :, rank * self.length : (rank + 1) * self.length]

    def _rows(self, rank: int) -> Tensor | None:
        whole = self.bias is None or self.bias.shape[2] == 1
        return self.bias if whole or self.bias is None else self._own(self.bias, rank)

    def _block(self, here: int, there: int) -> Block:
        part, index = self.part, self.options.get("index")
        if index is not None:
            positions = part.positions(here), part.positions(there)
            index = replace(index, coords=(0, 0, *positions))
        found = tiles(part, here, there) if self.is_causal else all_of(part, part)
        columns = part.stored(there)
        scale, dropout_p = self.options.get("scale"), self.options.get("dropout_p", 0.0)
        return Block(found, columns, scale, dropout_p, index)


def check(operands: list[Tensor], bias: Tensor | None, ranks: int, **options: Any) -> None:
    expected = _whole(*operands, bias, **options)
    for ours, theirs in zip(Ring(operands, bias, ranks, **options).run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_blocks_merge_to_attention_over_all_keys(ranks: int, is_causal: bool, groups: int) -> None:
    check(_operands(groups), None, ranks, is_causal=is_causal, scale=0.3)


def window(width: int) -> Tensor:
    """Each row sees the `width` keys up to its own."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return ((distance >= 0) & (distance < width))[None, None]


MASKS = {
    "window": window(3),
    "padding": (torch.arange(LENGTH) < torch.tensor([16, 3])[:, None])[:, None, None],
    "rows that see nothing": window(4) & (torch.arange(LENGTH) % 5 != 2)[:, None],
    "documents": (torch.arange(LENGTH)[:, None] // 6 == torch.arange(LENGTH) // 6)[None, None],
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_rows_that_see_none_of_a_block_take_nothing_from_it(name: str, is_causal: bool) -> None:
    mask = MASKS[name]
    check(_operands(), mask, 4, is_causal=is_causal)
    added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    check(_operands(), added, 4, is_causal=is_causal)


@pytest.mark.parametrize("ranks", [1, 4, 16])
@pytest.mark.parametrize("reach", range(LENGTH))
def test_a_block_is_seen_if_one_of_its_keys_is(ranks: int, reach: int) -> None:
    part, seen = Part(LENGTH, ranks), window(reach + 1)[0, 0]
    for here in range(ranks):
        for there in range(ranks):
            found = seen[part.stored(here), part.stored(there)].any().item()
            assert sees(part, here, there, reach) == found, (here, there)


@pytest.mark.parametrize(
    "shape", [(2, 4, 16, 16), (4, 16, 16), (1, 4, 1, 16), (16, 1), (1, 1, 1, 1)]
)
def test_a_learned_bias_has_the_gradient_of_every_block(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, dtype=torch.float64)
    four = bias.reshape((1,) * (4 - bias.dim()) + shape)
    check(_operands(), four, 4, is_causal=False)


def test_each_pair_of_query_and_key_is_dropped_or_kept_as_over_all_keys() -> None:
    index = RandomIndex(0, 3, 5, (BATCH, HEADS, LENGTH, LENGTH), (0, 0, 0, 0))
    check(_operands(2), None, 4, is_causal=True, dropout_p=0.3, index=index)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_zigzag_order_gives_what_the_sequence_gives_in_its_own(
    ranks: int, dropout_p: float
) -> None:
    part = Part(LENGTH, ranks, "zigzag")
    order = torch.cat([torch.as_tensor(part.positions(rank)) for rank in range(ranks)])
    assert order.sort().values.tolist() == list(range(LENGTH))
    index = RandomIndex(0, 3, 5, (BATCH, HEADS, LENGTH, LENGTH), (0, 0, 0, 0))
    options: dict[str, Any] = {"is_causal": True}
    options |= {"dropout_p": dropout_p, "index": index} if dropout_p else {}
    operands = _operands(2)
    expected = _whole(*operands, None, **options)
    found = Ring([x[:, :, order] for x in operands], None, ranks, order="zigzag", **options).run()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, order], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [LENGTH, 1])
def test_a_bias_has_both_sequences_in_zigzag_order(rows: int) -> None:
    part, bias = Part(LENGTH, 4, "zigzag"), torch.randn(BATCH, 1, rows, LENGTH).double()
    order = torch.cat([torch.as_tensor(part.positions(rank)) for rank in range(4)])
    operands = _operands(2)
    expected = _whole(*operands, bias, is_causal=True)
    above = order if rows > 1 else order[:1] * 0
    stored = bias[:, :, above][..., order]
    moved = [x[:, :, order] for x in operands]
    found = Ring(moved, stored, 4, is_causal=True, order="zigzag").run()
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(ours, theirs[:, :, order], rtol=1e-11, atol=1e-11)
    there = expected[4][:, :, above][..., order]
    torch.testing.assert_close(found[4], there, rtol=1e-11, atol=1e-11)


def test_steps_leave_as_it_is_what_they_are_given() -> None:
    q, k, v, grad = (x[:, :, :8] for x in _operands())
    out, lse, dq = torch.randn_like(v), torch.randn(q.shape[:-1]).double(), torch.randn_like(q)
    given = [q, k, v, grad, out, lse, dq]
    before = [x.clone() for x in given]
    part = Part(LENGTH, 2, "zigzag")
    for there in range(2):
        block = Block(tiles(part, 0, there), part.stored(there), None, 0.0, None)
        ring_forward(q, k, v, None, out, lse, block=block, last=True)
        ring_backward(grad, q, k, v, out, lse, None, dq, block=block, need_bias_grad=False)
    assert all(map(torch.equal, given, before))


def test_half_types_are_rounded_once() -> None:
    exact = _operands()
    half = [x.to(torch.bfloat16) for x in exact]
    expected = _whole(*(x.double() for x in half), None)
    for ranks in (2, 8):
        out, *grads = Ring(half, None, ranks, is_causal=False).run()
        assert out.dtype == torch.bfloat16
        assert {x.dtype for x in grads} == {torch.float32}
        errors = [
            (ours.double() - theirs).norm() / theirs.norm()
            for ours, theirs in zip((out, *grads), expected, strict=True)
        ]
        assert errors[0] < 2.5e-3, (ranks, errors)
        assert max(errors) < 4e-3, (ranks, errors)  # they read the rounded output

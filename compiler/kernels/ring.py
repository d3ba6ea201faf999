"""Attention over keys and values that come block by block, and its backward, on one rank.

A block of keys gives an output and the logarithm of its sum of exponentials; two of those merge to
what both blocks together give. The backward of a block needs the final output and logarithm alone,
so blocks may come in any order. Sums are taken in float32 at least.
Elsewhere: online softmax (Milakov and Gimelshein, 1805.02867), Ring Attention (2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.compiler.kernels.attention import attention_backward, block_attention
from meshwright.compiler.kernels.blocks import accumulation_dtype
from meshwright.compiler.kernels.hashing import Coords, RandomIndex


@dataclass(frozen=True)
class Tile:
    """Local queries `rows` that see local keys `keys`, all of them or, in a causal one, each those
    up to its own."""

    rows: slice
    keys: slice
    is_causal: bool = False


@dataclass(frozen=True)
class Block:
    """A block of keys at one rank: the tiles that its queries see, and which columns of a bias
    belong to it; `index` is that of all pairs of the rank's queries and the block's keys."""

    tiles: tuple[Tile, ...]
    columns: slice
    scale: float | None
    dropout_p: float
    index: RandomIndex | None

    def indexed(self, tile: Tile) -> RandomIndex | None:
        """The index of the pairs of a tile."""
        if self.index is None:
            return None
        rows, keys = tile.rows, tile.keys
        index = self.index.narrow(2, rows.start, rows.stop - rows.start)
        return index.narrow(3, keys.start, keys.stop - keys.start)


@dataclass(frozen=True)
class Part:
    """How a sequence of this length lies over `ranks`: in one part each or, in zigzag, in 2n parts
    of which rank r of n has the parts r and 2n - 1 - r, so that all see as many keys before them.
    """

    length: int
    ranks: int
    order: str = "contiguous"

    @property
    def own(self) -> int:
        """The number of positions of each rank."""
        return self.length // self.ranks

    def stored(self, rank: int) -> slice:
        """What a rank has of the sequence as it is stored."""
        return slice(rank * self.own, (rank + 1) * self.own)

    def positions(self, rank: int) -> Coords:
        """The positions in the sequence of what a rank has."""
        if self.order == "contiguous":
            return rank * self.own
        return self.position(torch.arange(rank * self.own, (rank + 1) * self.own))

    def position(self, stored: Tensor) -> Tensor:
        """The positions in the sequence of what is stored in these places."""
        if self.order == "contiguous":
            return stored
        half = self.own // 2
        rank, late = stored // self.own, stored // half % 2
        return torch.where(late == 1, 2 * self.ranks - 1 - rank, rank) * half + stored % half


def all_of(queries: Part, keys: Part) -> tuple[Tile, ...]:
    """All queries of a rank see all keys of a block."""
    return (Tile(slice(0, queries.own), slice(0, keys.own)),)


def tiles(part: Part, here: int, there: int) -> tuple[Tile, ...]:
    """Which keys of rank `there` the queries of rank `here` see where attention is causal."""
    whole = slice(0, part.own)
    if here == there:
        return (Tile(whole, whole, is_causal=True),)
    if part.order == "zigzag":
        half = part.own // 2
        early, late = slice(0, half), slice(half, part.own)
        return (Tile(whole, early),) if there < here else (Tile(late, whole),)
    return (Tile(whole, whole),) if there < here else ()


def sees(part: Part, here: int, there: int, reach: int) -> bool:
    """Whether a query of rank `here` looks back at a key of rank `there`, in a contiguous sequence;
    none looks back more than `reach` positions."""
    return there <= here and (here - there - 1) * part.own + 1 <= reach


def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    *,
    block: Block,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """Output and logarithm over the blocks so far and this one. Those of the `last` are as
    attention gives them."""
    kind = accumulation_dtype(q.dtype)
    if out is None or lse is None:
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=kind)
        lse = q.new_full(q.shape[:-1], -torch.inf, dtype=kind)
    for tile in block.tiles:
        tile_q, tile_k, tile_v = _tile(tile, q, k, v)
        found = block_attention(
            *(tile_q, tile_k, tile_v),
            _bias_tile(bias, block, tile),
            is_causal=tile.is_causal,
            scale=block.scale,
            dropout_p=block.dropout_p,
            index=block.indexed(tile),
        )
        out, lse = _merged(out, lse, *found, tile.rows)
    if last:
        return out.to(q.dtype), lse.masked_fill(lse == -torch.inf, 0)
    return out, lse


def ring_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    dq: Tensor | None,
    *,
    block: Block,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient of the queries over the blocks so far and this one, and what this one adds to
    those of its keys and values and of the bias."""
    kind = accumulation_dtype(q.dtype)
    dq = q.new_zeros(q.shape, dtype=kind) if dq is None else dq.clone()
    dk, dv = (x.new_zeros(x.shape, dtype=kind) for x in (k, v))
    wanted = bias is not None and need_bias_grad
    dbias = bias.new_zeros(bias.shape, dtype=kind) if bias is not None and wanted else None
    for tile in block.tiles:
        here = (..., tile.rows, slice(None))
        there = (..., tile.keys, slice(None))
        tile_q, tile_k, tile_v = _tile(tile, q, k, v)
        own_dq, own_dk, own_dv, own_dbias = attention_backward(
            *(grad[here], tile_q, tile_k, tile_v, out[here], lse[..., tile.rows]),
            _bias_tile(bias, block, tile),
            is_causal=tile.is_causal,
            scale=block.scale,
            dropout_p=block.dropout_p,
            index=block.indexed(tile),
            need_bias_grad=need_bias_grad,
        )
        dq[here] += own_dq
        dk[there] += own_dk
        dv[there] += own_dv
        seen = _bias_tile(dbias, block, tile)
        if seen is not None and own_dbias is not None:
            seen += own_dbias
    return dq, dk, dv, dbias


def _tile(tile: Tile, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = (..., tile.rows, slice(None)), (..., tile.keys, slice(None))
    return q[rows], k[keys], v[keys]


def _bias_tile(bias: Tensor | None, block: Block, tile: Tile) -> Tensor | None:
    """A view of the part of a bias that a tile has; a dim of 1 broadcasts."""
    if bias is None:
        return None
    if bias.shape[-1] > 1:
        bias = bias[..., block.columns][..., tile.keys]
    return bias[..., tile.rows, :] if bias.shape[-2] > 1 else bias


def _merged(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """What two sets of keys give together, where the second is seen by `rows` alone.

    A set of which a row sees nothing has the logarithm -inf, and no weight.
    """
    old, old_lse = out[..., rows, :], lse[..., rows]
    weight = torch.sigmoid(other_lse - old_lse).masked_fill_(other_lse == -torch.inf, 0)
    both = torch.lerp(old, other.to(out.dtype), weight.unsqueeze(-1))
    both_lse = torch.logaddexp(old_lse, other_lse)
    if both_lse.shape == lse.shape:
        return both, both_lse
    out, lse = out.clone(), lse.clone()
    out[..., rows, :], lse[..., rows] = both, both_lse
    return out, lse

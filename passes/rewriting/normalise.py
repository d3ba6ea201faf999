"""Replace operators by the few that rules, adjoints and kernels are written for.

Before:  cross_entropy_loss: f32[] = cross_entropy_loss(linear, targets)
After:   cross_entropy: (f32[8], f32[8]) = mesh::cross_entropy(linear, targets, None, -100,
             0.0, 96)
         getitem: f32[8]                 = cross_entropy[0]
         sum: f32[]                      = sum(getitem)
         ne: bool[8]                     = ne(targets, -100)
         sum_1: i64[]                    = sum(ne)
         to_copy: f32[]                  = to_copy(sum_1, dtype=f32)
         div: f32[]                      = div(sum, to_copy)

A mean is a sum and a count from here on: over a batch that is split, a mean of means is wrong.
Requires: a captured graph. Ensures: no operator of the table below is left.
Elsewhere: Megatron's and DTensor's loss-parallel functions, chosen by hand.
"""

from __future__ import annotations

import itertools
import math

import torch

from meshwright.compiler.composites.attention import Attention
from meshwright.compiler.composites.cross_entropy import CrossEntropy
from meshwright.compiler.composites.embedding import Embedding
from meshwright.compiler.composites.experts import Combine, Dispatch, Positions, Top
from meshwright.compiler.composites.grouped import GroupedMM, GroupedMMWeight
from meshwright.compiler.composites.norm import Norm
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph import experts
from meshwright.compiler.graph.ir import GETITEM, Graph, Node
from meshwright.passes.rewriting.random_numbers import refuse_random
from meshwright.passes.rewriting.recognise import grid_axes
from meshwright.passes.rewriting.rewriter import (
    REWRITES,
    Rewriter,
    rewrite_operators,
    rewrites,
    to_dtype,
)

aten = torch.ops.aten


def normalise(graph: Graph) -> Graph:
    """The graph with each operator of the table replaced."""
    return rewrite_operators(graph, REWRITES, unchanged=refuse_random)


@rewrites(aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default)
def _identity(rewriter: Rewriter) -> Node:
    x: Node = rewriter.args[0]
    return x


@rewrites(experts.TOP)
def _top(rewriter: Rewriter) -> Node:
    return rewriter.call(Top.op, *rewriter.args)


@rewrites(experts.POSITIONS)
def _positions(rewriter: Rewriter) -> Node:
    return rewriter.call(Positions.op, *rewriter.args)


@rewrites(experts.DISPATCH)
def _dispatch(rewriter: Rewriter) -> Node:
    x, slot, num_slots = rewriter.args
    return rewriter.call(Dispatch.op, x, slot, None, num_slots)


@rewrites(experts.COMBINE)
def _combine(rewriter: Rewriter) -> Node:
    return rewriter.call(Combine.op, *rewriter.args)


@rewrites(GETITEM)
def _item(rewriter: Rewriter) -> Node | None:
    """One of the values that were brought to a common shape is an expansion of itself."""
    source, index = rewriter.args
    if rewriter.node.args[0] in rewriter.items:
        found: Node = rewriter.items[rewriter.node.args[0]][index]
        return found
    if source.op != aten.broadcast_tensors.default:
        return None
    value: Node = source.args[0][index]
    shape = rewriter.node.tensor.shape
    if value.tensor.shape == shape:
        return value
    return rewriter.call(aten.expand.default, value, shape)


@rewrites(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)
def _cast(rewriter: Rewriter) -> Node:
    x: Node = rewriter.args[0]
    target = rewriter.node.tensor.dtype
    if target == x.tensor.dtype:
        return x
    return rewriter.call(aten._to_copy.default, x, dtype=target)


@rewrites(
    aten.flatten.using_ints, aten.unflatten.int, aten.reshape.default, aten._unsafe_view.default
)
def _view(rewriter: Rewriter) -> Node:
    return rewriter.call(aten.view.default, rewriter.args[0], rewriter.node.tensor.shape)


@rewrites(aten.repeat.default, aten.tile.default)
def _repeat(rewriter: Rewriter) -> Node | None:
    """Copies are an expansion: a rank that needs some of them makes only those."""
    x, counts, result = rewriter.args[0], rewriter.args[1], rewriter.node.tensor.shape
    if 0 in result:
        return None
    sizes = (1,) * (len(result) - len(x.tensor.shape)) + tuple(x.tensor.shape)
    counts = (1,) * (len(result) - len(counts)) + tuple(counts)
    pairs = list(zip(counts, sizes, strict=True))
    before = [(size,) if 1 in (count, size) else (1, size) for count, size in pairs]
    after = [(count * size,) if 1 in (count, size) else (count, size) for count, size in pairs]
    x = rewriter.call(aten.view.default, x, tuple(itertools.chain(*before)))
    x = rewriter.call(aten.expand.default, x, tuple(itertools.chain(*after)))
    return rewriter.call(aten.view.default, x, result)


@rewrites(aten.concat.default, aten.concatenate.default)
def _cat(rewriter: Rewriter) -> Node:
    return rewriter.call(aten.cat.default, *rewriter.args, **rewriter.kwargs)


@rewrites(aten.pad.default)
def _pad(rewriter: Rewriter) -> Node | None:
    if rewriter.option(2, "mode", "constant") != "constant":
        return None
    value = rewriter.option(3, "value")
    return rewriter.call(
        aten.constant_pad_nd.default,
        rewriter.args[0],
        rewriter.args[1],
        0.0 if value is None else value,
    )


@rewrites(aten.index.Tensor)
def _index(rewriter: Rewriter) -> Node | None:
    """A lookup that takes every element once, in order, only moves dims."""
    x, indices = rewriter.args[:2]
    axes = grid_axes(x, indices)
    if axes is None:
        return None
    order = sorted(range(len(axes)), key=axes.__getitem__)
    if order != list(range(len(axes))):
        rest = range(len(axes), len(x.tensor.shape))
        x = rewriter.call(aten.permute.default, x, (*order, *rest))
    return rewriter.call(aten.view.default, x, rewriter.node.tensor.shape)


@rewrites(aten.masked_scatter.default)
def _masked_scatter(rewriter: Rewriter) -> Node:
    """The k-th true place of the mask takes the k-th element; the k-th row, if rows are masked."""
    x, mask, source = rewriter.args
    shape = rewriter.node.tensor.shape
    if 0 in (*shape, *source.tensor.shape):
        return rewriter.call(aten.expand.default, x, shape)
    rows = _masked_rows(mask, shape)
    width = shape[-1:] if rows is not None and source.tensor.shape[-1:] == shape[-1:] else ()
    if rows is None or not width:
        rows, width = rewriter.call(aten.expand.default, mask, shape), ()
    count = math.prod(shape) // math.prod(width)
    places = rewriter.call(aten.cumsum.default, rewriter.call(aten.view.default, rows, (count,)), 0)
    places = rewriter.call(aten.sub.Tensor, places, 1)
    places = rewriter.call(aten.clamp_min.default, places, 0)
    size = math.prod(source.tensor.shape) // math.prod(width)
    flat = rewriter.call(aten.view.default, source, (size, *width))
    taken = rewriter.call(aten.index.Tensor, flat, (places,))
    taken = rewriter.call(aten.view.default, taken, shape)
    return rewriter.call(aten.where.self, rows, taken, x)


def _masked_rows(mask: Node, shape: tuple[int, ...]) -> Node | None:
    """The mask as `[..., 1]`, where it was expanded from that to `shape`."""
    if mask.op not in (aten.expand.default, aten.expand_as.default) or mask.tensor.shape != shape:
        return None
    rows: Node = mask.args[0]
    return rows if rows.tensor.shape == (*shape[:-1], 1) else None


@rewrites(aten.pixel_shuffle.default)
def _pixel_shuffle(rewriter: Rewriter) -> Node:
    """Channels become pixels of blocks: `[..., c·r·r, h, w]` to `[..., c, h·r, w·r]`."""
    x, r = rewriter.args
    *batch, channels, h, w = x.tensor.shape
    n = len(batch)
    apart = (*batch, channels // (r * r), r, r, h, w)
    return _reordered(rewriter, x, apart, (*range(n), n, n + 3, n + 1, n + 4, n + 2))


@rewrites(aten.pixel_unshuffle.default)
def _pixel_unshuffle(rewriter: Rewriter) -> Node:
    """Pixels of blocks become channels: `[..., c, h·r, w·r]` to `[..., c·r·r, h, w]`."""
    x, r = rewriter.args
    *batch, channels, h, w = x.tensor.shape
    n = len(batch)
    apart = (*batch, channels, h // r, r, w // r, r)
    return _reordered(rewriter, x, apart, (*range(n), n, n + 2, n + 4, n + 1, n + 3))


def _reordered(rewriter: Rewriter, x: Node, apart: tuple[int, ...], order: tuple[int, ...]) -> Node:
    """`x` with its dims taken apart, put into another order, and in the result's shape again."""
    x = rewriter.call(aten.view.default, x, apart)
    x = rewriter.call(aten.permute.default, x, order)
    return rewriter.call(aten.view.default, x, rewriter.node.tensor.shape)


@rewrites(aten.channel_shuffle.default)
def _channel_shuffle(rewriter: Rewriter) -> Node:
    """The first channel of every group, then the second, and so on."""
    x, groups = rewriter.args
    batch, channels, *rest = x.tensor.shape
    apart = (batch, groups, channels // groups, *rest)
    return _reordered(rewriter, x, apart, (0, 2, 1, *range(3, len(apart))))


@rewrites(aten.embedding.default)
def _embedding(rewriter: Rewriter) -> Node:
    if rewriter.option(3, "scale_grad_by_freq", False) or rewriter.option(4, "sparse", False):
        module = rewriter.node.origin.module
        where = f"the embedding `{module}`" if module else "an embedding in the model"
        raise CaptureError(
            f"{where} has `scale_grad_by_freq` or `sparse`",
            help="build the embedding without them",
        )
    weight, index = rewriter.args[:2]
    return rewriter.call(Embedding.op, weight, index, rewriter.option(2, "padding_idx", -1))


@rewrites(aten.layer_norm.default)
def _layer_norm(rewriter: Rewriter) -> Node:
    eps = rewriter.option(4, "eps", 1e-5)
    return _norm(rewriter, rewriter.option(3, "bias"), eps, "layer")


@rewrites(aten.rms_norm.default)
def _rms_norm(rewriter: Rewriter) -> Node:
    eps = rewriter.option(3, "eps")
    if eps is None:
        eps = torch.finfo(rewriter.args[0].tensor.dtype).eps
    return _norm(rewriter, None, eps, "rms")


def _norm(rewriter: Rewriter, bias: Node | None, eps: float, kind: str) -> Node:
    """A norm over multiple dims is one over their product."""
    x, shape, weight = rewriter.args[0], rewriter.args[1], rewriter.option(2, "weight")
    full = x.tensor.shape
    if len(shape) > 1:
        size = math.prod(shape)
        x = rewriter.call(aten.view.default, x, (*full[: -len(shape)], size))
        weight, bias = (
            None if p is None else rewriter.call(aten.view.default, p, (size,))
            for p in (weight, bias)
        )
    norm = rewriter.call(Norm.op, x, weight, bias, eps, kind)
    y = rewriter.call(GETITEM, norm, 0, type=x.type)
    return y if len(shape) == 1 else rewriter.call(aten.view.default, y, full)


@rewrites(aten.glu.default)
def _glu(rewriter: Rewriter) -> Node:
    x, dim = rewriter.args[0], rewriter.option(1, "dim", -1)
    half = x.tensor.shape[dim] // 2
    value = rewriter.call(aten.slice.Tensor, x, dim, 0, half)
    gate = rewriter.call(aten.slice.Tensor, x, dim, half, 2 * half)
    return rewriter.call(aten.mul.Tensor, value, rewriter.call(aten.sigmoid.default, gate))


@rewrites(aten.prelu.default)
def _prelu(rewriter: Rewriter) -> Node:
    x, weight = rewriter.args
    if len(x.tensor.shape) != 1:
        shape = (*weight.tensor.shape, *(1 for _ in x.tensor.shape[2:])) if x.tensor.shape else ()
        weight = rewriter.call(aten.view.default, weight, shape)
    positive = rewriter.call(aten.gt.Scalar, x, 0)
    return rewriter.call(aten.where.self, positive, x, rewriter.call(aten.mul.Tensor, weight, x))


@rewrites(aten.instance_norm.default)
def _instance_norm(rewriter: Rewriter) -> Node | None:
    """Without running statistics, each channel is a group."""
    x, weight, bias, mean, variance, _, _, eps, _ = rewriter.args
    if mean is not None or variance is not None:
        return None
    channels = x.tensor.shape[1]
    return rewriter.call(aten.group_norm.default, x, channels, weight, bias, eps)


@rewrites(aten.scaled_dot_product_attention.default)
def _attention(rewriter: Rewriter) -> Node:
    q, k, v = rewriter.args[:3]
    bias = rewriter.option(3, "attn_mask")
    dropout_p = float(rewriter.option(4, "dropout_p", 0.0))
    full = rewriter.node.tensor.shape
    q, k, v = (_four_dims(rewriter, x) for x in (q, k, v))
    if bias is not None:
        around, own = full[:-3], bias.tensor.shape
        if own[:-3] != around and math.prod(own[:-3]) > 1:
            bias = rewriter.call(aten.expand.default, bias, (*around, *own[-3:]))
        bias = _four_dims(rewriter, bias)
    attention = rewriter.call(
        Attention.op,
        *(q, k, v, bias, rewriter.option(5, "is_causal", False)),
        *(rewriter.option(6, "scale"), dropout_p, rewriter.random_id() if dropout_p else 0),
    )
    assert isinstance(attention.type, tuple)
    out = rewriter.call(GETITEM, attention, 0, type=attention.type[0])
    return out if len(full) == 4 else rewriter.call(aten.view.default, out, full)


def _four_dims(rewriter: Rewriter, x: Node) -> Node:
    """Attention's operands as [batch, heads, sequence, features]."""
    shape = x.tensor.shape
    if len(shape) == 4:
        return x
    if len(shape) < 4:
        return rewriter.call(aten.view.default, x, (1,) * (4 - len(shape)) + shape)
    return rewriter.call(aten.view.default, x, (math.prod(shape[:-3]), *shape[-3:]))


@rewrites(aten.cross_entropy_loss.default)
def _cross_entropy(rewriter: Rewriter) -> Node:
    logits, target, weight = rewriter.args[0], rewriter.args[1], rewriter.option(2, "weight")
    reduction = rewriter.option(3, "reduction", 1)
    ignore, smoothing = (
        rewriter.option(4, "ignore_index", -100),
        rewriter.option(5, "label_smoothing", 0.0),
    )
    last = len(logits.tensor.shape) - 1
    if last > 1:
        order = (0, *range(2, last + 1), 1)
        logits = rewriter.call(aten.permute.default, logits, order)
    if target.tensor.dtype.is_floating_point:
        return _soft_cross_entropy(rewriter, logits, target, weight, reduction, smoothing)
    result = rewriter.call(
        CrossEntropy.op,
        *(logits, target, weight, ignore, smoothing, logits.tensor.shape[-1]),
    )
    assert isinstance(result.type, tuple)
    rows = rewriter.call(GETITEM, result, 0, type=result.type[0])
    if reduction == 0:
        return to_dtype(rewriter, rows, logits.tensor.dtype)
    total = rewriter.call(aten.sum.default, rows)
    if reduction == 1:
        total = rewriter.call(
            aten.div.Tensor, total, _row_count(rewriter, target, weight, ignore, rows)
        )
    return to_dtype(rewriter, total, logits.tensor.dtype)


def _row_count(
    rewriter: Rewriter, target: Node, weight: Node | None, ignore: int, rows: Node
) -> Node:
    """The divisor of a mean over labels: how many are not ignored, or the sum of their weights."""
    counted = rewriter.call(aten.ne.Scalar, target, ignore)
    if weight is None:
        return to_dtype(rewriter, rewriter.call(aten.sum.default, counted), rows.tensor.dtype)
    picked = rewriter.call(
        aten.index.Tensor, weight, (rewriter.call(aten.mul.Tensor, target, counted),)
    )
    return rewriter.call(aten.sum.default, rewriter.call(aten.mul.Tensor, picked, counted))


def _soft_cross_entropy(
    rewriter: Rewriter,
    logits: Node,
    target: Node,
    weight: Node | None,
    reduction: int,
    smoothing: float,
) -> Node:
    """Targets that are probabilities: -sum(target * weight * log_softmax(logits))."""
    last = len(logits.tensor.shape) - 1
    classes = logits.tensor.shape[-1]
    if last > 1:
        target = rewriter.call(aten.permute.default, target, (0, *range(2, last + 1), 1))
    if smoothing:
        target = rewriter.call(aten.mul.Tensor, target, 1 - smoothing)
        target = rewriter.call(aten.add.Tensor, target, smoothing / classes)
    if weight is not None:
        target = rewriter.call(aten.mul.Tensor, target, weight)
    logs = rewriter.call(aten._log_softmax.default, logits, last, False)
    rows = rewriter.call(
        aten.sum.dim_IntList, rewriter.call(aten.mul.Tensor, logs, target), (last,)
    )
    return _reduced(rewriter, rewriter.call(aten.neg.default, rows), reduction)


@rewrites(aten.mean.default, aten.mean.dim)
def _mean(rewriter: Rewriter) -> Node:
    x = to_dtype(rewriter, rewriter.args[0], rewriter.node.tensor.dtype)
    shape = x.tensor.shape
    every = range(len(shape))
    dims = tuple(sorted(every[dim] for dim in rewriter.option(1, "dim") or every))
    keepdim = rewriter.option(2, "keepdim", False)
    total = rewriter.call(aten.sum.dim_IntList, x, dims, keepdim) if dims else x
    return rewriter.call(aten.div.Tensor, total, math.prod(shape[dim] for dim in dims))


@rewrites(aten.mse_loss.default)
def _mse_loss(rewriter: Rewriter) -> Node:
    x, target = rewriter.args[:2]
    difference = rewriter.call(aten.sub.Tensor, x, target)
    squares = rewriter.call(aten.mul.Tensor, difference, difference)
    return _reduced(rewriter, squares, rewriter.option(2, "reduction", 1))


def _reduced(rewriter: Rewriter, losses: Node, reduction: int) -> Node:
    """Losses as they are (0), their mean (1) or their sum (2)."""
    if reduction == 0:
        return losses
    total = rewriter.call(aten.sum.default, losses)
    count = math.prod(losses.tensor.shape)
    return total if reduction == 2 else rewriter.call(aten.div.Tensor, total, count)


@rewrites(aten._grouped_mm.default, "transformers::grouped_mm_fallback")
def _grouped_mm(rewriter: Rewriter) -> Node | None:
    """Products of consecutive groups: of the rows of x, the columns of w, or what is contracted."""
    x, w, ends = rewriter.args[0], rewriter.args[1], rewriter.option(2, "offs")
    if rewriter.option(3, "bias") is not None:
        return None
    if ends is None:
        return to_dtype(rewriter, rewriter.call(aten.bmm.default, x, w), rewriter.node.tensor.dtype)
    if len(x.tensor.shape) == 2:
        x = _turned(rewriter, x) if len(w.tensor.shape) == 2 else x
        y = _grouped_rows(rewriter, x, w, ends)
    else:
        y = _grouped_rows(rewriter, _turned(rewriter, w), _turned(rewriter, x), ends)
        y = _turned(rewriter, y)
    return to_dtype(rewriter, y, rewriter.node.tensor.dtype)


def _grouped_rows(rewriter: Rewriter, x: Node, w: Node, ends: Node) -> Node:
    """The product of each row with its group's matrix; of rows with rows, one matrix per group."""
    places = rewriter.call(aten.arange.default, x.tensor.shape[0], dtype=torch.int64)
    group = rewriter.call(aten.bucketize.Tensor, places, ends, right=True)
    group = rewriter.call(aten.unsqueeze.default, group, 1)
    if len(w.tensor.shape) == 3:
        y = rewriter.call(GroupedMM.op, x, w, group)
        return rewriter.call(aten.view.default, y, (*x.tensor.shape[:1], *w.tensor.shape[2:]))
    w, num_groups = rewriter.call(aten.unsqueeze.default, w, 1), ends.tensor.shape[0]
    return rewriter.call(GroupedMMWeight.op, x, w, group, num_groups)


def _turned(rewriter: Rewriter, x: Node) -> Node:
    return rewriter.call(aten.transpose.int, x, -2, -1)

"""The families of operators that `precision` tells apart, and the types that each computes in.

Products read and write the compute type. What moves values without computing, and elementwise
arithmetic, keeps the type of its operands. All else computes in float32: sums of many
numbers, and functions such as `exp` and `pow`, lose too much in 16 bits. The tables follow
torch.autocast's, except that norms return the type of what they normalise.
"""

from __future__ import annotations

from enum import Enum

import torch

from meshwright.compiler.composites.attention import Attention
from meshwright.compiler.composites.cross_entropy import CrossEntropy
from meshwright.compiler.composites.dropout import Dropout
from meshwright.compiler.composites.embedding import Embedding
from meshwright.compiler.composites.experts import Combine, Dispatch, Positions, Top
from meshwright.compiler.composites.extend import Extend
from meshwright.compiler.composites.grouped import GroupedMM, GroupedMMWeight
from meshwright.compiler.composites.norm import Norm
from meshwright.compiler.composites.ring_attention import RingAttention
from meshwright.compiler.graph.aliasing import is_view
from meshwright.compiler.graph.ir import GETITEM, Op
from meshwright.compiler.placing.rules.pointwise import UNTAGGED, is_pointwise
from meshwright.passes.statements.linears import is_convolution

aten = torch.ops.aten


class Width(Enum):
    """How an operator computes under `precision`."""

    NARROW = "in the compute type"
    WIDE = "in float32"
    INSIDE = "in float32 inside, and its first operand's type outside"
    SAME = "in the type of its operands"


PRODUCTS: dict[Op, str] = {
    **dict.fromkeys(
        (
            aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
            aten.mv.default, aten.dot.default, aten.addmm.default, aten.addmv.default,
            aten.addbmm.default, aten.baddbmm.default, aten.einsum.default,
            aten.bilinear.default, aten.tensordot.default, aten.linalg_multi_dot.default,
            aten.chain_matmul.default, GroupedMM.op, GroupedMMWeight.op,
        ),
        "matmul",
    ),
    Attention.op: "attention",
    RingAttention.op: "attention",
    Embedding.op: "embedding",
}  # fmt: skip
"""The operators that compute in the compute type, besides convolutions, by family."""

NORMS = frozenset(
    (
        Norm.op, aten.group_norm.default, aten.native_group_norm.default, aten.batch_norm.default,
        aten.native_batch_norm.default, aten._native_batch_norm_legit.no_stats,
        aten._native_batch_norm_legit_functional.default,
    )
)  # fmt: skip
"""Norms whose kernels take statistics and parameters of float32 beside values of 16 bits."""

NARROWED = ("attention", "convolution", "embedding", "matmul", "norm")
"""The families that `keep=` can keep in float32."""
ALWAYS_WIDE = ("loss", "recurrent", "router", "softmax")
"""Families that compute in float32 under every plan."""

_BENT = frozenset(
    getattr(aten, name)
    for name in (
        "acos", "acosh", "asin", "asinh", "atan", "atan2", "cos", "cosh", "digamma", "erf", "erfc",
        "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10", "log1p", "log2", "logaddexp",
        "logit", "log_sigmoid_forward", "log_sigmoid", "mse_loss", "polar", "pow", "reciprocal",
        "rsqrt", "sin", "sinh", "smooth_l1_loss", "huber_loss", "softplus", "sqrt", "tan", "xlogy",
        "binary_cross_entropy", "special_entr", "special_xlog1py", "special_log_ndtr", "atanh",
    )
)  # fmt: skip
"""Elementwise operators for which 16 bits are too few."""

_MOVED = frozenset(
    getattr(aten, name)
    for name in (
        "alias", "amax", "amin", "argmax", "argmin", "argsort", "as_strided_scatter", "cat",
        "channel_shuffle", "chunk", "col2im", "constant_pad_nd", "copy", "cummax", "cummin",
        "diag_embed", "diagonal_scatter", "dropout", "fill", "flip", "full_like", "gather",
        "im2col", "index", "index_copy", "index_fill", "index_put", "index_select", "masked_fill",
        "masked_scatter", "masked_select", "max", "max_pool1d", "max_pool2d",
        "max_pool2d_with_indices", "max_pool3d", "max_pool3d_with_indices", "median", "min",
        "narrow_copy", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like",
        "pad", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d",
        "reflection_pad3d", "repeat", "repeat_interleave", "replication_pad1d",
        "replication_pad2d", "replication_pad3d", "roll", "rot90", "scatter", "select_scatter",
        "slice_scatter", "sort", "stack", "take", "take_along_dim", "topk", "tril", "triu",
        "unfold_copy", "where", "zeros_like", "clone", "unsafe_split", "unsafe_chunk",
    )
)  # fmt: skip
"""Operators that are not elementwise, and move or compare values without computing new ones."""


def width(op: Op) -> Width:
    """How an operator computes where nothing else is said of it."""
    if family(op) in ("matmul", "attention", "convolution", "embedding"):
        return Width.NARROW
    if op in NORMS or op in (CrossEntropy.op, Combine.op):
        return Width.INSIDE
    if op in (GETITEM, Dropout.op, Extend.op, Dispatch.op, Positions.op, Top.op):
        return Width.SAME
    if not isinstance(op, torch._ops.OpOverload) or op.namespace not in ("aten", "mesh"):
        return Width.WIDE
    if op._overloadpacket in _BENT:
        return Width.WIDE
    plain = is_pointwise(op) or op in UNTAGGED or op._overloadpacket in _MOVED or is_view(op)
    return Width.SAME if plain else Width.WIDE


def family(op: Op) -> str | None:
    """The family of an operator that `precision` narrows, or may; None for any other."""
    if is_convolution(op):
        return "convolution"
    return "norm" if op in NORMS else PRODUCTS.get(op)

"""The rules table: one line per operator, in named factors.

`linear` names the terms through which pending sums pass: "each" by itself, "all" together, or
groups.
"""

from __future__ import annotations

import torch

from meshwright.compiler.graph.ir import Op
from meshwright.compiler.placing.rules.notation import Row

aten = torch.ops.aten

_FIRST = ((0,),)

CONTRACTIONS: dict[Op, Row] = {
    aten.linear.default: Row("... i, o i, o? -> ... o", ((0, 2), (1, 2)), added=2),
    aten.mm.default: Row("m k, k n -> m n", "each"),
    aten.bmm.default: Row("b m k, b k n -> b m n", "each"),
    aten.mv.default: Row("m k, k -> m", "each"),
    aten.dot.default: Row("k, k -> ", "each"),
    aten.outer.default: Row("m, n -> m n", "each"),
    aten.addmv.default: Row("m, m k, k -> m", ((0, 1), (0, 2)), added=0),
}

WHOLE_LAST: dict[Op, Row] = {
    aten.tril.default: Row("... m! n! -> ... m n", _FIRST),
    aten.triu.default: Row("... m! n! -> ... m n", _FIRST),
}

EMBEDDINGS: dict[Op, Row] = {
    aten.embedding.default: Row("v! d, ... -> ... d", _FIRST),
    aten.embedding_dense_backward.default: Row("... d, ... -> v! d", _FIRST),
    aten.one_hot.default: Row("... -> ... c!"),
}

NORMS: dict[Op, Row] = {
    aten._native_batch_norm_legit_functional.default: Row(
        "b! c ...!, c?, c?, c, c -> b c ..., c, c, c, c"
    ),
    aten._native_batch_norm_legit.no_stats: Row("b! c ...!, c?, c? -> b c ..., c, c"),
    aten._native_batch_norm_legit_no_training.default: Row(
        "b c ..., c?, c?, c, c -> b c ..., z, z"
    ),
    aten.native_batch_norm.default: Row("b! c ...!, c?, c?, c?, c? -> b c ..., c, c"),
    aten.native_batch_norm_backward.default: Row(
        "b! c ...!, b c ..., c?, c?, c?, c?, c? -> b c ..., c, c", _FIRST
    ),
    aten.group_norm.default: Row("b c! ...!, c?, c? -> b c ..."),
    aten.native_group_norm.default: Row("b c! ...!, c?, c? -> b c ..., b g, b g"),
    aten.native_group_norm_backward.default: Row(
        "b c! ...!, b c ..., b g!, b g, c? -> b c ..., c, c", _FIRST
    ),
}

_POOL_2D = Row("... h! w! -> ... x! y!")
_POOL_2D_BACKWARD = Row("... x! y!, ... h! w! -> ... h! w!", _FIRST, shape_only=(1,))

POOLS: dict[Op, Row] = {
    aten.max_pool1d.default: Row("... h! -> ... x!"),
    aten.max_pool2d.default: _POOL_2D,
    aten.max_pool2d_with_indices.default: Row("... h! w! -> ... x! y!, ... x! y!"),
    aten.max_pool2d_with_indices_backward.default: Row(
        "... x! y!, ... h! w!, ... x! y! -> ... h! w!", _FIRST, shape_only=(1,)
    ),
    aten.avg_pool1d.default: Row("... h! -> ... x!", _FIRST),
    aten.avg_pool2d.default: Row("... h! w! -> ... x! y!", _FIRST),
    aten.avg_pool2d_backward.default: _POOL_2D_BACKWARD,
    aten.adaptive_avg_pool1d.default: Row("... h! -> ... x!", _FIRST),
    aten.adaptive_avg_pool2d.default: Row("... h! w! -> ... x! y!", _FIRST),
    aten._adaptive_avg_pool2d.default: Row("... h! w! -> ... x! y!", _FIRST),
    aten._adaptive_avg_pool2d_backward.default: _POOL_2D_BACKWARD,
}

TABLE: dict[Op, Row] = {
    **CONTRACTIONS,
    **WHOLE_LAST,
    **EMBEDDINGS,
    **NORMS,
    **POOLS,
}

"""Rules of attention: batch and heads may be split; each head needs all keys.

Grouped-query attention has g heads of keys and values, g dividing the h of queries. They are split
together, in equal blocks; a single one is used by every rank's heads.
"""

from __future__ import annotations

from functools import partial

import torch

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import MeshOp
from meshwright.compiler.layout.layout import Dim, cut, dim_axes
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.notation import (
    Call,
    Dims,
    Group,
    Letters,
    Spec,
    broadcast_letters,
)
from meshwright.compiler.placing.rules.registry import rule

aten = torch.ops.aten

_QUERY, _KEY, _VALUE = ("b", "h", "s", "d"), ("b", "g", "t", "d"), ("b", "g", "t", "e")
_OUT, _LSE, _BIAS = ("b", "h", "s", "e"), ("b", "h", "s"), ("b", "h", "s", "t")
_WHOLE = frozenset("stde")


@rule(MeshOp("attention"))
def _attention(call: Call) -> Spec:
    """`attention(q, k, v, bias, ...) -> (out, lse)`."""
    return _spec(call, (_QUERY, _KEY, _VALUE, _BIAS), (_OUT, _LSE), query=0, bias=3)


@rule(MeshOp("attention_backward"))
def _attention_backward(call: Call) -> Spec:
    """`attention_backward(grad, q, k, v, out, lse, bias, ...) -> (dq, dk, dv, dbias)`."""
    operands = (_OUT, _QUERY, _KEY, _VALUE, _OUT, _LSE, _BIAS)
    results = (_QUERY, _KEY, _VALUE, _BIAS)
    return _spec(call, operands, results, query=1, bias=6, linear=(frozenset({0}),))


@rule(aten.scaled_dot_product_attention.default)
def _sdpa(call: Call) -> Spec:
    """`scaled_dot_product_attention(q, k, v, attn_mask, ...)` of four dims each, else whole."""
    ranks = {len(operand.type.shape) for operand in call.operands[:3]}
    if ranks == {4}:
        linear = (frozenset({2}),)
        return _spec(call, (_QUERY, _KEY, _VALUE, _BIAS), (_OUT,), query=0, bias=3, linear=linear)
    operands = tuple(
        tuple(f"{i}.{k}" for k in range(len(operand.type.shape)))
        for i, operand in enumerate(call.operands)
    )
    whole = frozenset(letter for letters in operands for letter in letters)
    return Spec(operands, (("r",) * len(call.operands[0].type.shape),), whole=whole)


def _spec(
    call: Call,
    terms: tuple[Letters, ...],
    results: tuple[Letters, ...],
    *,
    query: int,
    bias: int,
    linear: tuple[Group, ...] = (),
) -> Spec:
    shapes = [operand.type.shape for operand in call.operands]
    sizes = {**dict(zip(_QUERY, shapes[query], strict=True)), "t": shapes[query + 1][2]}
    has_bias = len(call.operands) > bias
    if has_bias:
        sizes_of_bias = _trailing(_BIAS, len(shapes[bias]))
        bias_letters = broadcast_letters(sizes_of_bias, call.operands[bias].type, sizes)
        terms = (*terms[:bias], bias_letters)
        results = tuple(bias_letters if letters is _BIAS else letters for letters in results)
    heads, groups = shapes[query][1], shapes[query + 1][1]
    if heads == groups:
        terms, results = (
            tuple(tuple("h" if x == "g" else x for x in letters) for letters in side)
            for side in (terms, results)
        )
    return Spec(
        terms[: len(call.operands)],
        tuple(
            None if type is None else letters
            for letters, type in zip(results, call.results, strict=True)
        ),
        whole=_WHOLE,
        linear=linear,
        derived=frozenset({"g"}) - ({"g"} if heads == groups else set()),
        bind=None if heads == groups else partial(_bind, groups, call.mesh),
        offers={} if heads == groups else {"h": _offered(call, heads, query)},
    )


def _trailing(letters: Letters, count: int) -> Letters:
    return letters[len(letters) - count :]


def _bind(groups: int, mesh: Mesh, dims: Dims) -> Dims:
    """How the heads of keys and values are split, given those of the queries."""
    heads = dims["h"]
    axes = dim_axes(heads)
    if not axes or groups == 1:
        return {"g": cut(groups)}
    blocks = len(heads) == 1 and len(heads[0]) == 1
    if not blocks or groups % mesh.size(axes):
        raise LayoutError(
            f"{groups} heads of keys and values do not divide over {mesh.size(axes)} ranks",
            code="grouped-heads",
            help="split the heads over fewer ranks, or have one head of keys and values",
        )
    return {"g": cut(groups, *axes)}


def _offered(call: Call, heads: int, query: int) -> tuple[Dim, ...]:
    """The queries' heads split as those of keys and values are."""
    found = []
    for operand in call.operands[query + 1 : query + 3]:
        axes = dim_axes(operand.layout.dims[1])
        if axes and heads % call.mesh.size(axes) == 0:
            found.append(cut(heads, *axes))
    return tuple(found)

"""Scaled dot product attention: batch and heads may be split; each head needs all keys.

Grouped-query attention has g heads of keys and values, g dividing the h of queries. They are split
together, in equal blocks; a single one is used by every rank's heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Arg, MeshOp, Node, NodeType, TensorType
from meshwright.compiler.kernels import attention as kernels
from meshwright.compiler.kernels.blocks import accumulation_dtype
from meshwright.compiler.layout.factors import Dim, cut, dim_axes
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.composite import (
    AdjointContext,
    BindingContext,
    Composite,
    Cotangents,
    Kernel,
    composite,
)
from meshwright.compiler.placing.rules.notation import (
    FIRST,
    Call,
    Dims,
    Group,
    Letters,
    Spec,
    broadcast_letters,
    present_terms,
)

QUERY, KEY, VALUE = ("b", "h", "s", "d"), ("b", "g", "t", "d"), ("b", "g", "t", "e")
OUT, LSE, BIAS = ("b", "h", "s", "e"), ("b", "h", "s"), ("b", "h", "s", "t")
COLUMNS = ("b", "h", "s", "u")
"""A bias of all keys, of which others are split."""
_WHOLE = frozenset("stude")


@composite
class Attention(Composite):
    """`attention(q, k, v, bias, is_causal, scale, dropout_p, op_id) -> (out, lse)`."""

    op = MeshOp("attention")
    number = 7

    def rule(self, call: Call) -> Spec:
        return attention_spec(call, (QUERY, KEY, VALUE, BIAS), (OUT, LSE), query=0, bias=3)

    def result_type(self, q: TensorType, k: TensorType, v: TensorType, *rest: Arg) -> NodeType:
        out = TensorType((*q.shape[:-1], v.shape[-1]), q.dtype)
        return (out, TensorType(q.shape[:-1], accumulation_dtype(q.dtype)))

    def adjoint(self, context: AdjointContext) -> Cotangents:
        q, k, v, bias, *options = context.node.args
        wants_bias = bias is not None and bias.requires_grad
        grads = context.items(
            context.call(
                AttentionBackward.op,
                *(context.grad, q, k, v, *context.results, bias, *options, wants_bias),
            )
        )
        return grads[: len(context.operands)]

    def bind(self, binding: BindingContext) -> Kernel:
        options = _options(binding, 4, binding.operand(0), binding.operand(1))
        return lambda *tensors: kernels.attention(*tensors, **options())


@composite
class AttentionBackward(Composite):
    """`attention_backward(grad, q, k, v, out, lse, bias, ..., wants_bias)` gives the gradients of
    q, k, v and the bias."""

    op = MeshOp("attention_backward")
    number = 10

    def rule(self, call: Call) -> Spec:
        operands = (OUT, QUERY, KEY, VALUE, OUT, LSE, BIAS)
        results = (QUERY, KEY, VALUE, BIAS)
        return attention_spec(call, operands, results, query=1, bias=6, linear=FIRST)

    def result_type(self, grad: TensorType, *rest: Arg) -> NodeType:
        q, k, v, _, _, bias = rest[:6]
        return (q, k, v, bias if rest[-1] else None)

    def bind(self, binding: BindingContext) -> Kernel:
        options = _options(binding, 7, binding.operand(1), binding.operand(2))
        backward = partial(kernels.attention_backward, need_bias_grad=binding.node.args[11])
        return lambda *tensors: backward(*tensors, **options())


def _options(binding: BindingContext, first: int, q: Node, k: Node) -> Callable[[], dict[str, Any]]:
    """The keywords of the kernels, for each step."""
    is_causal, scale, dropout_p, op_id = binding.node.args[first : first + 4]
    fixed = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}
    if not dropout_p:
        return lambda: fixed
    shape = (*q.tensor.shape[:3], k.tensor.shape[2])
    coords = binding.coordinates((*q.placed.dims[:3], k.placed.dims[2]))
    index = binding.index(op_id, shape, coords)
    return lambda: {**fixed, "index": index()}


def attention_spec(
    call: Call,
    terms: tuple[Letters, ...],
    results: tuple[Letters, ...],
    *,
    query: int,
    bias: int,
    linear: tuple[Group, ...] = (),
    over: tuple[str, ...] = (),
) -> Spec:
    """The rule of attention whose operands and results have these letters.

    `query`, `bias` and those in `linear` groups are numbers of terms; keys come after queries.
    `over` are the axes over which queries and keys are split, each along its sequence; then the
    columns of a bias, `u`, are whole.
    """
    present = present_terms(call)
    types = {term: operand.type for term, operand in zip(present, call.operands, strict=True)}
    (_, heads, length, _), (_, groups, keys, _) = types[query].shape, types[query + 1].shape
    if bias in types:
        sizes = dict(zip(QUERY, types[query].shape, strict=True)) | {"t": keys, "u": keys}
        trailing = terms[bias][len(terms[bias]) - len(types[bias].shape) :]
        letters = broadcast_letters(trailing, types[bias], sizes)
        results = tuple(letters if each is terms[bias] else each for each in results)
        terms = (*terms[:bias], letters, *terms[bias + 1 :])
    if heads == groups:
        terms, results = _with_one_letter(terms), _with_one_letter(results)
    kept = tuple(
        None if type is None else letters
        for letters, type in zip(results, call.results, strict=True)
    )
    along = {"s": cut(length, *over), "t": cut(keys, *over)} if over else {}
    spec = Spec(
        tuple(terms[term] for term in present),
        kept,
        whole=_WHOLE - along.keys(),
        linear=tuple(frozenset(map(present.index, group)) for group in linear),
        derived=frozenset(along),
        bind=(lambda dims: along) if along else None,
    )
    if heads == groups:
        return spec
    return replace(
        spec,
        derived=spec.derived | {"g"},
        bind=lambda dims: {**along, **_bind(groups, call.mesh, dims)},
        offers={"h": _offered(call, heads, present.index(query))},
    )


def _with_one_letter(side: tuple[Letters, ...]) -> tuple[Letters, ...]:
    """The letters where heads of keys are those of queries."""
    return tuple(tuple("h" if x == "g" else x for x in letters) for letters in side)


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
        for layout in operand.layouts:
            axes = dim_axes(layout.dims[1])
            if axes and heads % call.mesh.size(axes) == 0:
                found.append(cut(heads, *axes))
    return tuple(found)

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
)

_QUERY, _KEY, _VALUE = ("b", "h", "s", "d"), ("b", "g", "t", "d"), ("b", "g", "t", "e")
_OUT, _LSE, _BIAS = ("b", "h", "s", "e"), ("b", "h", "s"), ("b", "h", "s", "t")
_WHOLE = frozenset("stde")


@composite
class Attention(Composite):
    """`attention(q, k, v, bias, is_causal, scale, dropout_p, op_id) -> (out, lse)`."""

    op = MeshOp("attention")
    number = 7

    def rule(self, call: Call) -> Spec:
        return _spec(call, (_QUERY, _KEY, _VALUE, _BIAS), (_OUT, _LSE), query=0, bias=3)

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
        operands = (_OUT, _QUERY, _KEY, _VALUE, _OUT, _LSE, _BIAS)
        results = (_QUERY, _KEY, _VALUE, _BIAS)
        return _spec(call, operands, results, query=1, bias=6, linear=FIRST)

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
    if len(call.operands) > bias:
        trailing = _BIAS[len(_BIAS) - len(shapes[bias]) :]
        bias_letters = broadcast_letters(trailing, call.operands[bias].type, sizes)
        terms = (*terms[:bias], bias_letters)
        results = tuple(bias_letters if letters is _BIAS else letters for letters in results)
    heads, groups = shapes[query][1], shapes[query + 1][1]
    if heads == groups:
        terms, results = (
            tuple(tuple("h" if x == "g" else x for x in letters) for letters in side)
            for side in (terms, results)
        )
    kept = tuple(
        None if type is None else letters
        for letters, type in zip(results, call.results, strict=True)
    )
    spec = Spec(terms[: len(call.operands)], kept, whole=_WHOLE, linear=linear)
    if heads == groups:
        return spec
    return replace(
        spec,
        derived=frozenset("g"),
        bind=partial(_bind, groups, call.mesh),
        offers={"h": _offered(call, heads, query)},
    )


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

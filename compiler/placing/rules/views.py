"""Rules of operators that only rename, regroup or broadcast dims: they never communicate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Arg
from meshwright.compiler.layout.factors import Dim, dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.regroup import reshape
from meshwright.compiler.placing.rules.notation import (
    FIRST,
    Call,
    Dims,
    Letters,
    Spec,
    dim_index,
    numbered,
)
from meshwright.compiler.placing.rules.pointwise import cast_linear
from meshwright.compiler.placing.rules.registry import rule

aten = torch.ops.aten

RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten._reshape_copy.default,
    aten.view_copy.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.ravel.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
"""Operators that change the shape and keep the order of elements."""


@rule(*RESHAPES)
def _reshape(call: Call) -> Spec:
    """Any change of shape that keeps the order of elements."""
    (operand,), (result,) = call.operands, call.results
    assert result is not None
    old = numbered("x", len(operand.type.shape))
    new = numbered("r", len(result.shape))
    bind = partial(_regroup, old, new, result.shape, call.mesh)
    return Spec((old,), (new,), linear=FIRST, bind=bind, offers=_asked_for(call, old))


def _asked_for(call: Call, old: Letters) -> Mapping[str, tuple[Dim, ...]]:
    """The operand as a view of what is wanted of the result."""
    offers: dict[str, tuple[Dim, ...]] = {}
    for layout in call.wanted:
        try:
            viewed = reshape(layout, call.operands[0].type.shape, call.mesh)
        except LayoutError:
            continue
        for x, dim in zip(old, viewed.dims, strict=True):
            if dim_axes(dim):
                offers[x] = (*offers.get(x, ()), dim)
    return offers


def _regroup(old: Letters, new: Letters, shape: tuple[int, ...], mesh: Mesh, dims: Dims) -> Dims:
    layout = Layout(tuple(dims[letter] for letter in old))
    return dict(zip(new, reshape(layout, shape, mesh).dims, strict=True))


@rule(aten.squeeze.default)
def _squeeze(call: Call) -> Spec:
    """A dim must not become one of size 1 by being split: it would go too."""
    spec = _reshape(call)
    assert spec.bind is not None
    return replace(spec, bind=partial(_keep_dims, spec.bind, call.mesh))


def _keep_dims(bind: Callable[[Dims], Dims], mesh: Mesh, dims: Dims) -> Dims:
    layout = Layout(tuple(dims.values()))
    for size, local in zip(layout.shape, layout.local_shape(mesh), strict=True):
        if local == 1 != size:
            raise LayoutError(
                f"`{layout}` has a dim of size 1 on each rank, which `squeeze` would remove",
                code="squeezed-dim",
                help="name the dim to squeeze",
            )
    return bind(dims)


@rule(aten.to.other, aten.type_as.default)
def _cast_like(call: Call) -> Spec:
    """The second operand lends only its element type."""
    first, other = (operand.type.shape for operand in call.operands)
    letters = numbered("x", len(first))
    return Spec(
        (letters, ("",) * len(other)),
        (letters,),
        linear=tuple(map(frozenset, cast_linear(call))),
        ignored=frozenset({1}),
    )


@rule(aten.view_as.default, aten.reshape_as.default)
def _reshape_as(call: Call) -> Spec:
    """The second operand lends its local shape: it must be split as the result is."""
    (operand, _), (result,) = call.operands, call.results
    assert result is not None
    old = numbered("x", len(operand.type.shape))
    new = numbered("r", len(result.shape))
    return Spec(
        (old, new),
        (new,),
        linear=FIRST,
        shape_only=frozenset({1}),
        derived=frozenset(new),
        bind=partial(_regroup, old, new, result.shape, call.mesh),
    )


def _permuted(order: Sequence[int]) -> Spec:
    letters = numbered("x", len(order))
    return Spec((letters,), (tuple(letters[i] for i in order),), linear=FIRST)


@rule(aten.permute.default, aten.permute_copy.default)
def _permute(call: Call) -> Spec:
    rank = len(call.operands[0].type.shape)
    return _permuted([dim_index(i, rank) for i in call.arg(1)])


@rule(aten.transpose.int, aten.swapaxes.default, aten.transpose_copy.int)
def _transpose(call: Call) -> Spec:
    rank = len(call.operands[0].type.shape)
    order = list(range(rank))
    if rank:
        a, b = (dim_index(call.arg(place), rank) for place in (1, 2))
        order[a], order[b] = b, a
    return _permuted(order)


@rule(aten.t.default, aten.numpy_T.default, aten.t_copy.default)
def _reversed(call: Call) -> Spec:
    return _permuted(range(len(call.operands[0].type.shape))[::-1])


@rule(aten.mT.default, aten.adjoint.default, aten.matrix_H.default)
def _matrix_transpose(call: Call) -> Spec:
    rank = len(call.operands[0].type.shape)
    return _permuted([*range(rank - 2), rank - 1, rank - 2])


@rule(aten.movedim.intlist, aten.movedim.int)
def _movedim(call: Call) -> Spec:
    rank = len(call.operands[0].type.shape)
    sources, targets = (_as_dims(call.arg(place), rank) for place in (1, 2))
    rest = iter(i for i in range(rank) if i not in sources)
    moved = dict(zip(targets, sources, strict=True))
    return _permuted([moved[i] if i in moved else next(rest) for i in range(rank)])


def _as_dims(dims: Arg, rank: int) -> list[int]:
    return [dim_index(d, rank) for d in (dims if isinstance(dims, tuple) else (dims,))]


@rule(aten.expand.default, aten.broadcast_to.default, aten.expand_copy.default)
def _expand(call: Call) -> Spec:
    """Dims that grow are split only if the user of the result asks for it."""
    (operand,), (result,) = call.operands, call.results
    assert result is not None
    new = numbered("r", len(result.shape))
    offset = len(new) - len(operand.type.shape)
    old = tuple(
        new[offset + i] if size == result.shape[offset + i] else ""
        for i, size in enumerate(operand.type.shape)
    )
    return Spec((old,), (new,), linear=FIRST, free=frozenset(new) - frozenset(old))


@rule(aten.unfold.default)
def _unfold(call: Call) -> Spec:
    """Windows along a dim, which is whole; what is in a window becomes the last dim."""
    letters = numbered("x", len(call.operands[0].type.shape))
    dim = dim_index(call.arg(1), len(letters))
    windows = ("n",) if letters else ()
    result = (*letters[:dim], *windows, *letters[dim + 1 :], "w")
    return Spec((letters,), (result,), whole=frozenset(letters[dim : dim + 1]), linear=FIRST)


@rule(aten.view_as_complex.default, aten.view_as_real.default)
def _complex(call: Call) -> Spec:
    """Real and imaginary parts are a last dim, which is whole."""
    operand, (result,) = call.operands[0], call.results
    assert result is not None
    letters = numbered("x", min(len(operand.type.shape), len(result.shape)))
    sides = (operand.type.shape, result.shape)
    old, new = ((*letters, "p") if len(side) > len(letters) else letters for side in sides)
    return Spec((old,), (new,), whole=frozenset("p"), linear=FIRST)


@rule(aten.as_strided.default, aten.diagonal.default)
def _whole(call: Call) -> Spec:
    """Strided windows: each rank needs all of the operand."""
    (operand,), (result,) = call.operands, call.results
    assert result is not None
    old = numbered("x", len(operand.type.shape))
    new = numbered("r", len(result.shape))
    return Spec((old,), (new,), whole=frozenset(old), linear=FIRST)

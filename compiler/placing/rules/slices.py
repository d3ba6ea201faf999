"""Rules of operators that take parts of a dim, or put parts together."""

from __future__ import annotations

import contextlib
import itertools
import math
from functools import partial

import torch

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Arg
from meshwright.compiler.layout.factors import Dim, dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.regroup import reshape
from meshwright.compiler.layout.slicing import (
    extend_dim,
    interleave_dim,
    join_dims,
    repeat_dim,
    resized,
    slice_dim,
)
from meshwright.compiler.placing.rules.notation import (
    FIRST,
    Call,
    Dims,
    Letters,
    Spec,
    dim_index,
    numbered,
    one_linear_group,
    with_letter,
)
from meshwright.compiler.placing.rules.registry import rule

aten = torch.ops.aten


def _without(letters: Letters, dim: int) -> Letters:
    return (*letters[:dim], *letters[dim + 1 :])


def _dim(call: Call, place: int, default: int = 0, *, operand: int = 0) -> int:
    return dim_index(call.arg(place, default), len(call.operands[operand].type.shape))


@rule(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.unsafe_split.Tensor,
    aten.unsafe_chunk.default,
)
def _split(call: Call) -> Spec:
    """Neighbouring pieces of a dim, from its beginning."""
    letters, dim = numbered("x", len(call.operands[0].type.shape)), _dim(call, 2)
    bounds: dict[str, tuple[int, int]] = {}
    start = 0
    for i, result in enumerate(call.results):
        assert result is not None
        bounds[f"p{i}"] = (start, start + result.shape[dim])
        start += result.shape[dim]
    return Spec(
        (letters,),
        tuple(with_letter(letters, dim, piece) for piece in bounds),
        linear=FIRST,
        bind=partial(_bind_slices, letters[dim], bounds, call.mesh),
    )


def _bind_slices(source: str, bounds: dict[str, tuple[int, int]], mesh: Mesh, dims: Dims) -> Dims:
    return {
        letter: slice_dim(dims[source], start, stop, mesh)
        for letter, (start, stop) in bounds.items()
    }


def slice_bounds(size: int, start: Arg, stop: Arg) -> tuple[int, int]:
    """Start and stop of a slice as torch reads them."""
    low, high, _ = slice(start, stop).indices(size)
    return low, max(low, high)


@rule(aten.slice.Tensor, aten.slice_copy.Tensor)
def _slice(call: Call) -> Spec:
    """A step needs the dim whole, or in blocks of which it takes one element each."""
    shape, dim = call.operands[0].type.shape, _dim(call, 1)
    bounds, step = slice_bounds(shape[dim], call.arg(2), call.arg(3)), call.arg(4, 1)
    if not is_digit(shape[dim], bounds, step):
        return _slice_of(call, dim, bounds, step)
    letters = numbered("x", len(shape))
    bind = partial(_bind_digit, letters[dim], step, call.mesh)
    return Spec((letters,), (with_letter(letters, dim, "p"),), linear=FIRST, bind=bind)


def is_digit(size: int, bounds: tuple[int, int], step: int) -> bool:
    """Whether a slice takes one element of each block of `step`: gates that are interleaved."""
    start, stop = bounds
    return 1 < step < size and size % step == 0 and start < step and stop > size - step + start


def _bind_digit(letter: str, step: int, mesh: Mesh, dims: Dims) -> Dims:
    """The dim split by whole blocks of `step`."""
    layout = Layout((dims[letter],))
    blocks, digit = reshape(layout, (layout.shape[0] // step, step), mesh).dims
    if dim_axes(digit):
        raise LayoutError(
            f"blocks of {step} are split", code="split-block", help="split whole blocks"
        )
    return {"p": blocks}


@rule(aten.narrow.default)
def _narrow(call: Call) -> Spec:
    """`narrow(x, dim, start, length)`."""
    shape, dim = call.operands[0].type.shape, _dim(call, 1)
    start = call.arg(2) % shape[dim] if shape[dim] else 0
    return _slice_of(call, dim, (start, start + call.arg(3)), 1)


def _slice_of(call: Call, dim: int, bounds: tuple[int, int], step: int) -> Spec:
    letters = numbered("x", len(call.operands[0].type.shape))
    return Spec(
        (letters,),
        (with_letter(letters, dim, "p"),),
        whole=frozenset() if step == 1 else frozenset({letters[dim]}),
        linear=FIRST,
        bind=partial(_bind_slices, letters[dim], {"p": bounds}, call.mesh) if step == 1 else None,
    )


@rule(aten.select.int, aten.unbind.int, aten.select_copy.int)
def _select(call: Call) -> Spec:
    """An element of a dim: the dim is whole."""
    letters, dim = numbered("x", len(call.operands[0].type.shape)), _dim(call, 1)
    results = tuple(_without(letters, dim) for _ in call.results)
    return Spec((letters,), results, whole=frozenset({letters[dim]}), linear=FIRST)


@rule(aten.cat.default)
def _cat(call: Call) -> Spec:
    """Operands split over the same axes in that dim give segments; else it is whole."""
    rank = max(len(operand.type.shape) for operand in call.operands)
    letters, dim = numbered("x", rank), dim_index(call.arg(1, 0), rank)
    names = tuple(f"c{i}" for i in range(len(call.operands)))
    operands = tuple(
        # torch lets an empty vector be joined to anything.
        with_letter(letters, dim, name) if len(operand.type.shape) == rank else (name,)
        for name, operand in zip(names, call.operands, strict=True)
    )
    return Spec(
        operands,
        (with_letter(letters, dim, "c"),),
        linear=one_linear_group(call),
        derived=frozenset(names[1:]),
        offers={"c0": _offered(call, dim)},
        bind=partial(_bind_join, call, dim, names),
    )


def _offered(call: Call, dim: int) -> tuple[Dim, ...]:
    """The splits of the other operands, as splits of the first."""
    size = call.operands[0].type.shape[dim]
    found: list[Dim] = []
    for layout in itertools.chain.from_iterable(each.layouts for each in call.operands[1:]):
        own = layout.dims[dim]
        if dim_axes(own):
            with contextlib.suppress(LayoutError):
                found.append(resized(own, size, call.mesh))
    return tuple(found)


def _bind_join(call: Call, dim: int, names: tuple[str, ...], dims: Dims) -> Dims:
    first, mesh = dims[names[0]], call.mesh
    found: dict[str, Dim] = {}
    for name, operand in zip(names[1:], call.operands[1:], strict=True):
        own = operand.layout.dims[min(dim, len(operand.layout.dims) - 1)]
        same = set(dim_axes(own)) == set(dim_axes(first))
        found[name] = own if same else resized(first, operand.type.shape[dim], mesh)
    return {**found, "c": join_dims((first, *found.values()), mesh)}


@rule(aten.stack.default)
def _stack(call: Call) -> Spec:
    """A new dim, whole."""
    letters = numbered("x", len(call.operands[0].type.shape))
    dim = dim_index(call.arg(1, 0), len(letters) + 1)
    result = (*letters[:dim], "n", *letters[dim:])
    return Spec((letters,) * len(call.operands), (result,), linear=one_linear_group(call))


@rule(aten.constant_pad_nd.default)
def _constant_pad(call: Call) -> Spec:
    """Zeros may be added to each summand; any other value only once."""
    return _padded(call, not call.arg(2, 0))


@rule(aten.pad.default)
def _pad(call: Call) -> Spec:
    """As `constant_pad_nd`; the other modes copy elements of the operand."""
    return _padded(call, call.arg(2, "constant") != "constant" or not call.arg(3))


def _padded(call: Call, linear: bool) -> Spec:
    pad = call.arg(1)
    rank = len(call.operands[0].type.shape)
    letters = numbered("x", rank)
    changed = {rank - 1 - i // 2 for i, amount in enumerate(pad) if amount}
    result = tuple(f"r{i}" if i in changed else letter for i, letter in enumerate(letters))
    whole = frozenset(letters[i] for i in changed)
    return Spec((letters,), (result,), whole=whole, linear=FIRST if linear else ())


@rule(aten.slice_scatter.default)
def _slice_scatter(call: Call) -> Spec:
    """The dim is whole, in the operand and in what replaces a part of it."""
    letters, dim = numbered("x", len(call.operands[0].type.shape)), _dim(call, 2)
    whole = frozenset({letters[dim], "s"})
    source = with_letter(letters, dim, "s")
    return Spec((letters, source), (letters,), whole=whole, linear=one_linear_group(call))


@rule(aten.select_scatter.default)
def _select_scatter(call: Call) -> Spec:
    """The dim is whole."""
    letters, dim = numbered("x", len(call.operands[0].type.shape)), _dim(call, 2)
    return Spec(
        (letters, _without(letters, dim)),
        (letters,),
        whole=frozenset({letters[dim]}),
        linear=one_linear_group(call),
    )


@rule(aten.select_backward.default)
def _select_backward(call: Call) -> Spec:
    """Zeros but for one element of a new dim, which is whole."""
    letters = numbered("x", len(call.operands[0].type.shape))
    dim = dim_index(call.arg(2), len(letters) + 1)
    return Spec((letters,), ((*letters[:dim], "n", *letters[dim:]),), linear=FIRST)


@rule(aten.slice_backward.default)
def _slice_backward(call: Call) -> Spec:
    """Zeros around the operand: split as the user asks, or in more of the same blocks."""
    (operand,) = call.operands
    letters, dim = numbered("x", len(operand.type.shape)), dim_index(call.arg(2), len(call.arg(1)))
    size, step = call.arg(1)[dim], call.arg(5)
    start, stop = slice_bounds(size, call.arg(3), call.arg(4))
    result = with_letter(letters, dim, "r")
    if is_digit(size, (start, stop), step):

        def bind(dims: Dims) -> Dims:
            return {"r": interleave_dim(dims[letters[dim]], step, call.mesh)}

        return Spec((letters,), (result,), linear=FIRST, bind=bind)
    if step != 1:
        return Spec((letters,), (result,), whole=frozenset({letters[dim]}), linear=FIRST)
    offers: list[Dim] = []
    for layout in operand.layouts:
        with contextlib.suppress(LayoutError):
            offers.append(extend_dim(layout.dims[dim], start, size, call.mesh))
    return Spec(
        (letters,),
        (result,),
        linear=FIRST,
        derived=frozenset({letters[dim]}),
        bind=partial(_bind_slices, "r", {letters[dim]: (start, stop)}, call.mesh),
        offers={"r": tuple(offers)},
        free=frozenset({"r"}),
    )


@rule(aten.repeat.default, aten.tile.default)
def _repeat(call: Call) -> Spec:
    """k copies of a dim are a leading factor of k."""
    (operand,), (result,) = call.operands, call.results
    assert result is not None
    letters, new = numbered("x", len(operand.type.shape)), numbered("r", len(result.shape))
    counts = {
        (letters[-i], new[-i]): result.shape[-i] // max(operand.type.shape[-i], 1)
        for i in range(1, len(letters) + 1)
    }

    def bind(dims: Dims) -> Dims:
        return {
            target: repeat_dim(dims[source], count, call.mesh)
            for (source, target), count in counts.items()
        }

    return Spec((letters,), (new,), linear=FIRST, bind=bind)


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(call: Call) -> Spec:
    """k copies of each element of a dim are a trailing factor of k."""
    rank = len(call.operands[0].type.shape)
    letters, count, dim = numbered("x", rank), call.arg(1), call.arg(2)
    result = ("r",) if dim is None else with_letter(letters, dim_index(dim, rank), "r")

    def bind(dims: Dims) -> Dims:
        layout = Layout(tuple(dims[letter] for letter in letters))
        if dim is None:
            layout = reshape(layout, (math.prod(layout.shape),), call.mesh)
        return {"r": interleave_dim(layout.dims[dim or 0], count, call.mesh)}

    return Spec((letters,), (result,), linear=FIRST, bind=bind)

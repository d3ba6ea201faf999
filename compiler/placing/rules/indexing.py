"""Rules of operators that look elements up, or put them, by index."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from meshwright.compiler.graph.slots import Slot
from meshwright.compiler.placing.rules.notation import (
    FIRST,
    Call,
    Group,
    Letters,
    Spec,
    broadcast,
    dim_index,
    leading_letters,
    numbered,
    replicate,
    with_letter,
)
from meshwright.compiler.placing.rules.registry import rule

aten = torch.ops.aten


def _indexed(call: Call) -> tuple[Letters, Letters, tuple[Letters, ...], frozenset[str]]:
    """Letters of `x[indices]`: of x, of the result and of each index; and the looked-up dims."""
    indices: Sequence[Slot | None] = call.arg(1)
    letters = numbered("x", len(call.operands[0].type.shape))
    places = [i for i, index in enumerate(indices) if index is not None]
    ranks = [len(call.operands[index.index].type.shape) for index in indices if index is not None]
    shared = leading_letters(max(ranks))
    rest = tuple(letter for i, letter in enumerate(letters) if i not in places)
    # Neighbouring indices put their dims in the place of the first; others put them in front.
    front = places[0] if places[-1] - places[0] == len(places) - 1 else 0
    result = (*rest[:front], *shared, *rest[front:])
    terms = tuple(shared[len(shared) - rank :] for rank in ranks)
    return letters, result, terms, frozenset(letters[i] for i in places)


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(call: Call) -> Spec:
    """The dims that are looked up are whole; those of the indices may be split."""
    letters, result, terms, looked_up = _indexed(call)
    operands = broadcast((letters, *terms), call)
    return Spec(operands, (result,), whole=looked_up, linear=FIRST)


@rule(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(call: Call) -> Spec:
    """Added to zeros, the values of split indices leave the result partial."""
    letters, result, terms, looked_up = _indexed(call)
    last = len(call.operands) - 1
    rank = len(call.operands[last].type.shape)
    operands = broadcast((letters, *terms, result[len(result) - rank :]), call)
    adds_to_zeros = bool(call.arg(3, False)) and call.operands[0].any_sum
    closed = looked_up if adds_to_zeros else looked_up | (set(result) - set(letters))
    return Spec(operands, (letters,), whole=closed, linear=(frozenset({0, last}),))


def _has_scalar(call: Call) -> bool:
    """Whether an operand has no dims or no elements: torch then takes it as another shape."""
    return any(not math.prod(x.type.shape) or not x.type.shape for x in call.operands)


def _aligned(call: Call, dim: int, terms: Sequence[int]) -> tuple[list[Letters], frozenset[str]]:
    """Letters of operands with equally many dims, shared where sizes agree but not in `dim`; and
    the letters of the other dims that are not shared, which must be whole."""
    shapes = [call.operands[term].type.shape for term in terms]
    letters: list[list[str]] = [[] for _ in shapes]
    whole: set[str] = set()
    for i in range(len(shapes[0])):
        same = len({shape[i] for shape in shapes}) == 1 and i != dim
        for k, found in enumerate(letters):
            found.append(f"x{i}" if same else f"x{i}.{k}")
            if not same and i != dim:
                whole.add(f"x{i}.{k}")
    return [tuple(found) for found in letters], frozenset(whole)


@rule(aten.gather.default)
def _gather(call: Call) -> Spec:
    """`gather(x, dim, index)`: x is whole in that dim."""
    if _has_scalar(call):
        return replicate(call)
    rank = len(call.operands[0].type.shape)
    dim = dim_index(call.arg(1), rank)
    (x, index), whole = _aligned(call, dim, (0, 1))
    looked_up = {x[dim]} if rank else set()
    return Spec((x, index), (index,), whole=whole | looked_up, linear=FIRST)


@rule(aten.scatter_add.default)
def _scatter_add(call: Call) -> Spec:
    """`scatter_add(x, dim, index, src)`: added to zeros, split indices leave the result partial."""
    if _has_scalar(call):
        return replicate(call)
    rank = len(call.operands[0].type.shape)
    dim = dim_index(call.arg(1), rank)
    (x, index, source), whole = _aligned(call, dim, (0, 1, 2))
    shapes = [operand.type.shape for operand in call.operands]
    if rank and shapes[1][dim] == shapes[2][dim]:
        source = with_letter(source, dim, index[dim])
    closed = {x[dim], source[dim]} if rank else set()
    if call.operands[0].any_sum and index[dim : dim + 1] == source[dim : dim + 1]:
        closed -= set(index[dim : dim + 1])
    elif rank:
        closed |= {index[dim]}
    return Spec((x, index, source), (x,), whole=whole | closed, linear=(frozenset({0, 2}),))


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_reduce.two)
def _scatter(call: Call) -> Spec:
    """The dim is whole in every operand."""
    if _has_scalar(call):
        return replicate(call)
    rank = len(call.operands[0].type.shape)
    dim = dim_index(call.arg(1), rank)
    operands, whole = _aligned(call, dim, range(len(call.operands)))
    closed = {letters[dim] for letters in operands if rank}
    linear: tuple[Group, ...] = (frozenset({0, 2}),) if call.op is aten.scatter.src else ()
    if call.op is aten.scatter.value and not call.arg(3):
        linear = FIRST
    return Spec(tuple(operands), tuple(operands[:1]), whole=whole | closed, linear=linear)


@rule(aten.index_select.default)
def _index_select(call: Call) -> Spec:
    """`index_select(x, dim, index)`: x is whole in that dim."""
    if _has_scalar(call):
        return replicate(call)
    letters = numbered("x", len(call.operands[0].type.shape))
    dim = dim_index(call.arg(1), len(letters))
    result = with_letter(letters, dim, "j")
    return Spec((letters, ("j",)), (result,), whole=frozenset({letters[dim]}), linear=FIRST)


@rule(aten.index_add.default)
def _index_add(call: Call) -> Spec:
    """`index_add(x, dim, index, source)`: added to zeros, split indices leave it partial."""
    if _has_scalar(call):
        return replicate(call)
    letters = numbered("x", len(call.operands[0].type.shape))
    dim = dim_index(call.arg(1), len(letters))
    source = with_letter(letters, dim, "j")
    closed = {letters[dim]} if call.operands[0].any_sum else {letters[dim], "j"}
    return Spec(
        (letters, ("j",), source),
        (letters,),
        whole=frozenset(closed),
        linear=(frozenset({0, 2}),),
    )


@rule(aten.index_copy.default, aten.index_reduce.default)
def _index_copy(call: Call) -> Spec:
    """`index_copy(x, dim, index, source)`: the dim is whole; what is replaced does not add up."""
    letters = numbered("x", len(call.operands[0].type.shape))
    dim = dim_index(call.arg(1), len(letters))
    source = with_letter(letters, dim, "j")[: len(call.operands[2].type.shape)]
    copies = call.op is aten.index_copy.default
    return Spec(
        (letters, ("j",)[: len(call.operands[1].type.shape)], source),
        (letters,),
        whole=frozenset({*letters[dim : dim + 1], "j"}),
        linear=(frozenset({0, 2}),) if copies else (),
    )


@rule(aten.index_fill.int_Scalar)
def _index_fill(call: Call) -> Spec:
    """`index_fill(x, dim, index, number)`: linear where the number is 0."""
    letters = numbered("x", len(call.operands[0].type.shape))
    dim = dim_index(call.arg(1), len(letters))
    return Spec(
        (letters, ("j",)[: len(call.operands[1].type.shape)]),
        (letters,),
        whole=frozenset({*letters[dim : dim + 1], "j"}),
        linear=() if call.arg(3) else FIRST,
    )


@rule(aten.bucketize.Tensor, aten.isin.Tensor_Tensor)
def _among(call: Call) -> Spec:
    """Each element is compared with all of the second operand."""
    letters, others = (
        numbered(prefix, len(operand.type.shape))
        for prefix, operand in zip("xo", call.operands, strict=True)
    )
    return Spec((letters, others), (letters,), whole=frozenset(others))

"""Rules of operators that reduce dims, or need some of them whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from meshwright.compiler.graph.ir import Arg, Op
from meshwright.compiler.placing.rules.notation import (
    FIRST,
    Call,
    Group,
    Letters,
    Rule,
    Spec,
    differentiable,
    dim_index,
    numbered,
    one_linear_group,
)
from meshwright.compiler.placing.rules.registry import FUNCTIONS, rule

aten = torch.ops.aten


def _listed(dims: Arg, rank: int) -> frozenset[int]:
    """The dims meant by an argument; none or an empty list means all."""
    if dims is None or dims == ():
        return frozenset(range(rank))
    listed = dims if isinstance(dims, tuple) else (dims,)
    return frozenset(dim_index(d, rank) for d in listed) & frozenset(range(rank))


def _remaining(letters: Letters, reduced: Iterable[int], keepdim: bool) -> Letters:
    gone = frozenset(reduced)
    if keepdim:
        return tuple("" if i in gone else letter for i, letter in enumerate(letters))
    return tuple(letter for i, letter in enumerate(letters) if i not in gone)


def _reduction(
    how: str, dims_at: int | None, keep_at: int | None = 2, *, empty_is_all: bool = True
) -> Rule:
    """A reduction over the dims at an argument's place; `how` is sum, max, min, mean or whole.

    A mean is linear, but the mean of a part is not a part of the mean: its dims are whole too. An
    empty list of dims means all of them or, without `empty_is_all`, none.
    """

    def reduction(call: Call) -> Spec:
        letters = numbered("x", len(call.operands[0].type.shape))
        dims = None if dims_at is None else call.arg(dims_at)
        listed = empty_is_all or dims != ()
        reduced = _listed(dims, len(letters)) if listed else frozenset[int]()
        keepdim = dims_at is not None and keep_at is not None and call.arg(keep_at, False)
        # Only a pending sum has an adjoint.
        closed = how in ("mean", "whole") or (how != "sum" and differentiable(call))
        return Spec(
            (letters,),
            tuple(_remaining(letters, reduced, keepdim) for _ in call.results),
            whole=frozenset(letters[i] for i in reduced) if closed else frozenset(),
            linear=FIRST if how in ("sum", "mean") else (),
            reduce=how if how in ("max", "min") else "sum",
        )

    return reduction


REDUCTIONS: dict[Op, Rule] = {
    aten.sum.default: _reduction("sum", None),
    aten.sum.dim_IntList: _reduction("sum", 1),
    aten.mean.default: _reduction("mean", None),
    aten.mean.dim: _reduction("mean", 1),
    aten.amax.default: _reduction("max", 1),
    aten.amin.default: _reduction("min", 1),
    aten.max.default: _reduction("max", None),
    aten.min.default: _reduction("min", None),
    aten.any.default: _reduction("max", None),
    aten.any.dim: _reduction("max", 1),
    aten.any.dims: _reduction("max", 1, empty_is_all=False),
    aten.all.default: _reduction("min", None),
    aten.all.dim: _reduction("min", 1),
    aten.all.dims: _reduction("min", 1, empty_is_all=False),
    aten.max.dim: _reduction("whole", 1),
    aten.min.dim: _reduction("whole", 1),
    aten.argmax.default: _reduction("whole", 1),
    aten.argmin.default: _reduction("whole", 1),
    aten.prod.default: _reduction("whole", None),
    aten.prod.dim_int: _reduction("whole", 1),
    aten.logsumexp.default: _reduction("whole", 1),
    aten.linalg_vector_norm.default: _reduction("whole", 2, 3),
    aten.norm.ScalarOpt_dim: _reduction("whole", 2, 3),
    aten.norm.Scalar: _reduction("whole", None),
    aten.var.correction: _reduction("whole", 1, 3),
    aten.var.dim: _reduction("whole", 1, 3),
    aten.std.correction: _reduction("whole", 1, 3),
    aten.var_mean.correction: _reduction("whole", 1, 3),
    aten.median.dim: _reduction("whole", 1),
    aten.count_nonzero.dim_IntList: _reduction("sum", 1, None),
    aten.count_nonzero.default: _reduction("sum", 1, None),
}


def _along(dims_at: int, linear: tuple[Group, ...] = (), default: Arg = -1) -> Rule:
    """Elementwise over all dims but those at an argument's place, which must be whole."""

    def along(call: Call) -> Spec:
        rank = len(call.operands[0].type.shape)
        letters = numbered("x", rank)
        whole = _listed(call.arg(dims_at, default), rank)
        return Spec(
            (letters,) * len(call.operands),
            tuple(
                None if type is None else letters if len(type.shape) == rank else ()
                for type in call.results
            ),
            whole=frozenset(letters[i] for i in whole),
            linear=linear,
        )

    return along


ALONG: dict[Op, Rule] = {
    aten._softmax.default: _along(1),
    aten.softmax.int: _along(1),
    aten._safe_softmax.default: _along(1),
    aten._log_softmax.default: _along(1),
    aten.log_softmax.int: _along(1),
    aten._softmax_backward_data.default: _along(2, linear=FIRST),
    aten._log_softmax_backward_data.default: _along(2, linear=FIRST),
    aten.cumsum.default: _along(1, linear=FIRST),
    aten.cumprod.default: _along(1),
    aten.logcumsumexp.default: _along(1),
    aten.cummax.default: _along(1),
    aten.cummin.default: _along(1),
    aten.sort.default: _along(1),
    aten.sort.stable: _along(2),
    aten.argsort.default: _along(1),
    aten.argsort.stable: _along(2),
    aten.flip.default: _along(1, linear=FIRST),
    aten.roll.default: _along(2, linear=FIRST, default=None),
}


@rule(aten.topk.default)
def _topk(call: Call) -> Spec:
    """Values and indices have k elements in the dim, and each depends on the whole dim."""
    rank = len(call.operands[0].type.shape)
    letters, dim = numbered("x", rank), dim_index(call.arg(2, -1), rank)
    result = tuple("k" if i == dim else letter for i, letter in enumerate(letters))
    return Spec((letters,), (result, result), whole=frozenset(letters[dim : dim + 1]))


@rule(aten.diff.default)
def _diff(call: Call) -> Spec:
    """Differences of neighbours: the dim is whole."""
    rank = len(call.operands[0].type.shape)
    dim = dim_index(call.arg(2, -1), rank)
    operands = tuple(
        tuple(f"d{k}" if i == dim else f"x{i}" for i in range(rank))
        for k in range(len(call.operands))
    )
    result = tuple("d" if i == dim else f"x{i}" for i in range(rank))
    whole = frozenset(f"d{k}" for k in range(len(call.operands)))
    return Spec(operands, (result,), whole=whole, linear=one_linear_group(call))


@rule(aten.layer_norm.default, aten.native_layer_norm.default, aten.rms_norm.default)
def _layer_norm(call: Call) -> Spec:
    """The last `len(normalized_shape)` dims are whole; weight and bias have just those."""
    rank, last = len(call.operands[0].type.shape), len(call.arg(1))
    letters = numbered("x", rank)
    normalised = letters[rank - last :]
    rows = (*letters[: rank - last], *("" for _ in normalised))
    return Spec(
        (letters, *(normalised for _ in call.operands[1:])),
        (letters, rows, rows)[: len(call.results)],
        whole=frozenset(normalised),
    )


@rule(aten.histc.default)
def _histogram(call: Call) -> Spec:
    """Counts of parts add up, unless the bounds are those of the values."""
    letters = numbered("x", len(call.operands[0].type.shape))
    open_bounds = call.arg(2, 0) == call.arg(3, 0)
    return Spec((letters,), (("n",),), whole=frozenset(letters) if open_bounds else frozenset())


FUNCTIONS.update(REDUCTIONS)
FUNCTIONS.update(ALONG)

"""The arguments of one rank's calls, from those of the global call and its layouts.

Where a global call has sizes or bounds of a dim that is split, a rank passes its own; every other
argument is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from meshwright.compiler.graph.ir import Arg, MeshOp, Op
from meshwright.compiler.layout.factors import dim_axes
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.notation import dim_index
from meshwright.compiler.placing.rules.resampling import INTERPOLATIONS_BACKWARD
from meshwright.compiler.placing.rules.slices import is_digit, slice_bounds

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class PlacedCall:
    """A call with the layouts of its operands and results. What stands for tensors in `args` does
    not matter."""

    op: Op
    args: tuple[Arg, ...]
    kwargs: Mapping[str, Arg]
    operands: tuple[Layout, ...]
    results: tuple[Layout | None, ...]
    mesh: Mesh

    def result_shape(self, index: int = 0) -> tuple[int, ...]:
        """The shape of a result on one rank."""
        layout = self.results[index]
        assert layout is not None, self.op
        return layout.local_shape(self.mesh)

    def arg(self, place: int, default: Arg = None) -> Arg:
        """An argument by its place in the schema."""
        if place < len(self.args):
            return self.args[place]
        return self.kwargs.get(self._name(place), default)

    def with_arg(self, place: int, value: Arg) -> PlacedCall:
        """Another argument in that place."""
        if place < len(self.args):
            return replace(self, args=(*self.args[:place], value, *self.args[place + 1 :]))
        return replace(self, kwargs={**self.kwargs, self._name(place): value})

    def _name(self, place: int) -> str:
        assert not isinstance(self.op, MeshOp), self.op
        name: str = self.op._schema.arguments[place].name
        return name


Localiser: TypeAlias = Callable[[PlacedCall], PlacedCall]

LOCAL: dict[Op, Localiser] = {}
"""How to localise the calls of an operator; calls of others are the same on every rank."""


def local_args(
    op: Op,
    args: tuple[Arg, ...],
    kwargs: Mapping[str, Arg],
    operands: Iterable[Layout],
    results: Iterable[Layout | None],
    mesh: Mesh,
) -> tuple[tuple[Arg, ...], dict[str, Arg]]:
    """The arguments one rank passes, given the layouts of the call's operands and results."""
    if op not in LOCAL:
        return args, dict(kwargs)
    found = LOCAL[op](PlacedCall(op, args, kwargs, tuple(operands), tuple(results), mesh))
    return found.args, dict(found.kwargs)


def _localises(*ops: Op) -> Callable[[Localiser], Localiser]:
    def register(function: Localiser) -> Localiser:
        LOCAL.update(dict.fromkeys(ops, function))
        return function

    return register


_SIZES: dict[Op, int] = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten._reshape_copy.default: 1,
    aten.view_copy.default: 1,
    aten.expand.default: 1,
    aten.expand_copy.default: 1,
    aten.broadcast_to.default: 1,
    aten.zeros.default: 0,
    aten.ones.default: 0,
    aten.full.default: 0,
    aten.empty.memory_format: 0,
    aten.new_zeros.default: 1,
    aten.new_ones.default: 1,
    aten.new_full.default: 1,
    aten.new_empty.default: 1,
    aten.select_backward.default: 1,
    **dict.fromkeys(INTERPOLATIONS_BACKWARD, 2),
}
"""Where an operator takes the shape of its result."""


@_localises(*_SIZES)
def _sized(call: PlacedCall) -> PlacedCall:
    assert not isinstance(call.op, MeshOp)
    return call.with_arg(_SIZES[call.op], list(call.result_shape()))


@_localises(aten.unflatten.int)
def _unflatten(call: PlacedCall) -> PlacedCall:
    dim = dim_index(call.arg(1), len(call.operands[0].dims))
    return call.with_arg(2, list(call.result_shape()[dim : dim + len(call.arg(2))]))


def _piece_sizes(call: PlacedCall) -> list[int]:
    dim = dim_index(call.arg(2, 0), len(call.operands[0].dims))
    return [call.result_shape(i)[dim] for i in range(len(call.results))]


@_localises(aten.split.Tensor, aten.unsafe_split.Tensor)
def _split(call: PlacedCall) -> PlacedCall:
    sizes = _piece_sizes(call)
    return call.with_arg(1, max(sizes[0], 1))


@_localises(aten.split.sizes, aten.split_with_sizes.default)
def _split_with_sizes(call: PlacedCall) -> PlacedCall:
    return call.with_arg(1, _piece_sizes(call))


def _ranks(layout: Layout, dim: int, mesh: Mesh) -> int:
    """The number of equal shares of a dim; bounds within it scale alike."""
    return mesh.size(dim_axes(layout.dims[dim]))


@_localises(aten.slice.Tensor, aten.slice_copy.Tensor)
def _slice(call: PlacedCall) -> PlacedCall:
    source = call.operands[0]
    dim = dim_index(call.arg(1, 0), len(source.dims))
    ranks = _ranks(source, dim, call.mesh)
    if ranks == 1:
        return call
    start, stop = slice_bounds(source.shape[dim], call.arg(2), call.arg(3))
    if is_digit(source.shape[dim], (start, stop), call.arg(4, 1)):
        return call.with_arg(3, source.shape[dim] // ranks)
    return call.with_arg(2, start // ranks).with_arg(3, stop // ranks)


@_localises(aten.narrow.default)
def _narrow(call: PlacedCall) -> PlacedCall:
    source = call.operands[0]
    dim = dim_index(call.arg(1), len(source.dims))
    ranks = _ranks(source, dim, call.mesh)
    start = call.arg(2) % max(source.shape[dim], 1)
    return call.with_arg(2, start // ranks).with_arg(3, call.arg(3) // ranks)


@_localises(aten.slice_backward.default)
def _slice_backward(call: PlacedCall) -> PlacedCall:
    result = call.results[0]
    assert result is not None
    dim = dim_index(call.arg(2), len(result.dims))
    ranks = _ranks(result, dim, call.mesh)
    call = call.with_arg(1, list(call.result_shape()))
    if ranks == 1:
        return call
    start, stop = slice_bounds(result.shape[dim], call.arg(3), call.arg(4))
    if is_digit(result.shape[dim], (start, stop), call.arg(5)):
        return call.with_arg(4, result.shape[dim] // ranks)
    return call.with_arg(3, start // ranks).with_arg(4, stop // ranks)


@_localises(aten.repeat_interleave.self_int)
def _repeat_interleave(call: PlacedCall) -> PlacedCall:
    """The size of the output is only a hint."""
    return replace(call, kwargs={k: v for k, v in call.kwargs.items() if k != "output_size"})


def _groups(call: PlacedCall, place: int, grouped: Layout, weight: Layout) -> PlacedCall:
    """The call with a rank's groups: its channels of `grouped`, divided by the weight's second
    dim."""
    if call.arg(place, 1) == 1:
        return call
    own = weight.local_shape(call.mesh)
    channels = grouped.local_shape(call.mesh)[1 - len(own)]
    return call.with_arg(place, channels // own[1])


@_localises(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def _conv(call: PlacedCall) -> PlacedCall:
    return _groups(call, 6, *call.operands[:2])


@_localises(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(call: PlacedCall) -> PlacedCall:
    return _groups(call, 6, _result(call), call.operands[1])


@_localises(aten.convolution.default)
def _convolution(call: PlacedCall) -> PlacedCall:
    return _groups(call, 8, _result(call) if call.arg(6) else call.operands[0], call.operands[1])


@_localises(aten.convolution_backward.default)
def _convolution_backward(call: PlacedCall) -> PlacedCall:
    grad, x, weight = call.operands
    call = _groups(call, 9, grad if call.arg(7) else x, weight)
    return call if call.results[2] is None else call.with_arg(3, list(call.result_shape(2)))


def _result(call: PlacedCall) -> Layout:
    found = call.results[0]
    assert found is not None, call.op
    return found


@_localises(aten.native_group_norm.default)
def _group_norm(call: PlacedCall) -> PlacedCall:
    return call.with_arg(3, call.result_shape()[0])


@_localises(aten.native_group_norm_backward.default)
def _group_norm_backward(call: PlacedCall) -> PlacedCall:
    return call.with_arg(5, call.operands[0].local_shape(call.mesh)[0])

"""Rules of convolutions: batch and channels may be split, never the spatial dims.

The weight is [G·o, i, ...] for G groups of i input and o output channels ([G·i, o, ...] of a
transposed one). A split by groups cuts input and output alike: a rank convolves its own groups. A
split of o in every group gives a rank part of the output of each; one of i leaves pending sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Arg
from meshwright.compiler.graph.slots import Slot
from meshwright.compiler.layout.cuts import (
    Cut,
    Interval,
    dim_of,
    intervals_of,
    is_chain,
    ordered,
)
from meshwright.compiler.layout.factors import Dim, dim_axes
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.rules.notation import (
    Call,
    Dims,
    Letters,
    Operand,
    Spec,
    numbered,
)
from meshwright.compiler.placing.rules.registry import rule

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Channels:
    """The channels of a convolution. `joint` is the letter of the weight's first dim, in which the
    groups are; `inner` that of its second; `other` the joint one on the side of `inner`."""

    groups: int
    transposed: bool
    joint: str
    inner: str
    other: str
    joint_size: int
    inner_size: int
    mesh: Mesh

    @property
    def each(self) -> int:
        """The channels of a group in the joint dim."""
        return max(self.joint_size // self.groups, 1)

    def bind(self, closed: bool, dims: Dims) -> Dims:
        """How the other side's channels are split, given the weight's.

        `closed` forbids what would leave pending sums.
        """
        found = self._other(dims[self.joint], dims[self.inner])
        within = {
            c.axis for p in intervals_of(dims[self.joint], self.mesh) for c in self._within(p)
        }
        if closed and within:
            raise _refused()
        return {self.other: found}

    def _within(self, interval: Interval) -> list[Cut]:
        """The cuts of an interval of the joint dim that lie inside its groups."""
        found = [cut for cut in interval.cuts if cut.stride % self.each]
        if any(self.each % cut.extent for cut in found):
            raise _refused()
        return found

    def _other(self, joint: Dim, inner: Dim) -> Dim:
        """The groups as the joint dim has them, each split as the inner one is."""
        own, *more = intervals_of(inner, self.mesh)
        if more:
            raise _refused()
        found = []
        for interval in intervals_of(joint, self.mesh):
            within = self._within(interval)
            outer = [cut for cut in interval.cuts if cut not in within]
            if interval.length % self.each or any(cut.extent % self.each for cut in outer):
                raise _refused()
            scaled = [
                Cut(cut.stride // self.each * self.inner_size, cut.size, cut.axis) for cut in outer
            ]
            length = interval.length // self.each * self.inner_size
            cuts = ordered([*scaled, *own.cuts])
            if not is_chain(cuts, length):
                raise _refused()
            found.append(Interval(length, cuts))
        return dim_of(found)

    def offers(self, other: Dim) -> dict[str, tuple[Dim, ...]]:
        """What a split of the other side's channels asks of the weight's dims."""
        intervals = intervals_of(other, self.mesh)
        inner_cuts = {
            cut for interval in intervals for cut in interval.cuts if cut.extent <= self.inner_size
        }
        groups = []
        for interval in intervals:
            outer = [cut for cut in interval.cuts if cut not in inner_cuts]
            apart = all(cut.stride % self.inner_size == 0 for cut in outer)
            if interval.length % self.inner_size or not apart:
                return {}
            cuts = (
                Cut(cut.stride // self.inner_size * self.each, cut.size, cut.axis) for cut in outer
            )
            groups.append(Interval(interval.length // self.inner_size * self.each, ordered(cuts)))
        inner = ordered(inner_cuts)
        found = {self.joint: dim_of(groups)}
        if is_chain(inner, self.inner_size):
            found[self.inner] = dim_of((Interval(self.inner_size, inner),))
        return {letter: (dim,) for letter, dim in found.items() if dim_axes(dim)}


def _refused() -> LayoutError:
    return LayoutError(
        "the channels are not split by whole groups, nor alike in each",
        code="split-groups",
        help="split the groups, or the channels of every group",
    )


def _channels(call: Call, weight: Operand, transposed: bool, groups: int) -> _Channels:
    joint, inner, other = ("i", "o", "o") if transposed else ("o", "i", "i")
    if groups > 1:
        other = other.upper()
    sizes = weight.type.shape
    return _Channels(groups, transposed, joint, inner, other, sizes[0], sizes[1], call.mesh)


def _letters(x: Operand, weight: Operand, channels: _Channels) -> tuple[Letters, Letters, Letters]:
    """Letters of the input, the weight and the output; spatial ones, capital, are whole."""
    spatial = len(weight.type.shape) - 2
    batch = ("n",) if len(x.type.shape) == spatial + 2 else ()
    ins, outs = channels.other, channels.joint
    if channels.transposed:
        ins, outs = outs, ins
    return (
        (*batch, ins, *numbered("X", spatial)),
        (channels.joint, channels.inner, *numbered("W", spatial)),
        (*batch, outs, *numbered("Y", spatial)),
    )


def _spec(
    call: Call,
    channels: _Channels,
    operands: tuple[Letters, ...],
    results: tuple[Letters | None, ...],
    linear: tuple[set[int], ...],
    *,
    bias: bool,
) -> Spec:
    """The rule; `bias` says that there is one, to be added, or its gradient summed, only once."""
    letters = {letter for each in (*operands, *results) for letter in each or ()}
    whole = {letter for letter in letters if letter[0] in "XYW"}
    contracted = "i"
    closed = bias and channels.joint == contracted
    if bias and (channels.groups == 1 or not closed):
        whole.add(contracted)
    spec = Spec(operands, results, frozenset(whole), linear=tuple(map(frozenset, linear)))
    if channels.groups == 1:
        return spec
    offers: dict[str, tuple[Dim, ...]] = {}
    for term, operand in zip(operands, call.operands, strict=True):
        if channels.other in term:
            for layout in operand.layouts:
                found = channels.offers(layout.dims[term.index(channels.other)])
                offers |= {letter: (*offers.get(letter, ()), *found[letter]) for letter in found}
    bind = partial(channels.bind, closed)
    return replace(spec, derived=frozenset({channels.other}), bind=bind, offers=offers)


def _forward(call: Call, transposed: bool, groups: Arg) -> Spec:
    x, weight = call.operands[:2]
    channels = _channels(call, weight, transposed, groups)
    ins, weights, outs = _letters(x, weight, channels)
    bias = len(call.operands) > 2
    operands = (ins, weights, *(((outs[1 - len(weights)],),) if bias else ()))
    linear = ({0, 2}, {1, 2}) if bias else ({0}, {1})
    return _spec(call, channels, operands, (outs,), linear, bias=bias)


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def _conv(call: Call) -> Spec:
    """`conv(x, weight, bias, stride, padding, dilation, groups)`."""
    return _forward(call, False, call.arg(6, 1))


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv_transpose(call: Call) -> Spec:
    """`conv_transpose(x, weight, bias, stride, padding, output_padding, groups, dilation)`."""
    return _forward(call, True, call.arg(6, 1))


@rule(aten.convolution.default)
def _convolution(call: Call) -> Spec:
    """`convolution(x, weight, bias, stride, padding, dilation, transposed, _, groups)`."""
    return _forward(call, call.arg(6), call.arg(8))


@rule(aten.convolution_backward.default)
def _convolution_backward(call: Call) -> Spec:
    """`convolution_backward(grad, x, weight, bias_sizes, ..., transposed, _, groups, mask)`.

    Split input channels would leave each rank the whole gradient of the bias, so they may not be.
    """
    assert isinstance(call.arg(1), Slot)
    _, x, weight = call.operands
    channels = _channels(call, weight, call.arg(7), call.arg(9))
    ins, weights, outs = _letters(x, weight, channels)
    results = tuple(
        letters if type is not None else None
        for letters, type in zip(
            (ins, weights, (outs[1 - len(weights)],)), call.results, strict=True
        )
    )
    return _spec(
        call,
        channels,
        (outs, ins, weights),
        results,
        ({0},),
        bias=call.arg(10)[2],
    )

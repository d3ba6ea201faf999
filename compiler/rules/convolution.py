"""Rules of convolutions: batch and channels may be split, never the spatial dims."""

from __future__ import annotations

import torch

from meshwright.compiler.ir import Arg
from meshwright.compiler.rules.notation import Call, Letters, Slot, Spec, numbered
from meshwright.compiler.rules.registry import rule

aten = torch.ops.aten


def _letters(call: Call, transposed: bool, groups: int) -> tuple[Letters, Letters, Letters]:
    """Letters of the input, the weight and the output; grouped channels are whole."""
    spatial = len(call.operands[1].type.shape) - 2
    i, o = ("i", "o") if groups == 1 else ("I", "O")
    rank = len(call.operands[0].type.shape)
    batch = ("n",) if rank == spatial + 2 else ()
    weight = ("i", "o") if transposed else ("o", "i")
    if groups != 1:
        weight = ("W", "V")
    return (
        (*batch, i, *numbered("X", spatial)),
        (*weight, *numbered("W", spatial)),
        (*batch, o, *numbered("Y", spatial)),
    )


def _closed(*operands: Letters) -> frozenset[str]:
    """The letters that must be whole: capital ones."""
    return frozenset(letter for letters in operands for letter in letters if letter[0].isupper())


def _forward(call: Call, transposed: bool, groups: Arg) -> Spec:
    x, weight, y = _letters(call, transposed, groups)
    bias = len(call.operands) > 2
    whole = _closed(x, weight, y) | ({"i"} if bias else set())
    operands = (x, weight, *(((y[-len(weight) + 1],),) if bias else ()))
    groups_of = ({0, 2}, {1, 2}) if bias else ({0}, {1})
    return Spec(operands, (y,), whole=whole, linear=tuple(map(frozenset, groups_of)))


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
    shifted = Call(call.op, (), (), call.operands[1:], call.results, call.mesh)
    x, weight, y = _letters(shifted, call.arg(7), call.arg(9))
    bias = (y[-len(weight) + 1],)
    mask = call.arg(10)
    results = tuple(
        letters if type is not None else None
        for letters, type in zip((x, weight, bias), call.results, strict=True)
    )
    whole = _closed(x, weight, y) | ({"i"} if mask[2] else set())
    return Spec((y, x, weight), results, whole=whole, linear=(frozenset({0}),))

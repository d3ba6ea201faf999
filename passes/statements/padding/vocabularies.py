"""Store a vocabulary padded, and cut the padding off where its entries would be seen.

Before:  head_weight: f32[97, 16]        = input(parameter head.weight)
         linear: f32[8, 97]              = linear(embedding, head_weight)
         cross_entropy: (f32[8], f32[8]) = mesh::cross_entropy(linear, targets, None, -100,
             0.0, 97)
After:   head_weight: f32[98, 16]        = input(parameter head.weight)
         linear: f32[8, 98]              = linear(embedding, head_weight)
         cross_entropy: (f32[8], f32[8]) = mesh::cross_entropy(linear, targets, None, -100,
             0.0, 97)

The rules of operators say where padding goes (`padder.py`). The entries added to a parameter are
zero, and stay zero: no result depends on them, so their gradient is zero. That holds as long as no
value computed from them, and no slope, is infinite. An operator that is linear in what is padded is
safe; any other elementwise one is tried out. The loss and a lookup are told the true number of rows
and mask the rest. Whatever else mixes entries (a reduction, a sort, a softmax) takes the tensor
without its padding.
Requires: pins. Ensures: no output and no reduction sees a pad entry.
Elsewhere: Megatron pads the vocabulary for good; DTensor splits unevenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.graph.ir import Arg, MeshOp, Node, TensorType
from meshwright.compiler.graph.slots import filled
from meshwright.compiler.layout.extents import Extent, Padding, padding_between
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.placing.rules.notation import Call, Spec
from meshwright.compiler.placing.rules.pointwise import POINTWISE, is_pointwise
from meshwright.passes.statements.draft import Draft, input_key
from meshwright.passes.statements.padding.padder import Padder, resized, treats_apart

_POINTS = (-8.0, -1.5, -1.0, -0.5, 0.0, 0.25, 1.0, 2.5, 8.0)
"""Values that pad entries may have; most are zero."""


def pad(draft: Draft) -> Draft:
    """The graph with every parameter that is pinned longer than it is at its padded shape."""
    uneven = any(_padding(draft, node) for node in draft.graph.inputs)
    return _Padder(draft).run() if uneven else draft


def _padding(draft: Draft, node: Node) -> Padding | None:
    pin = draft.inputs.get(input_key(node))
    whole = replicated(node.tensor.shape)
    return padding_between(whole, pin.layout, draft.mesh) if pin else None


class _Padder(Padder):
    def input(self, node: Node) -> Node:
        padding = _padding(self.draft, node)
        if padding is None:
            return super().input(node)
        (extent,) = padding.extents
        extents = {padding.dim: extent}
        new = self.builder.copy(node, {}, type=resized(node.tensor, extents))
        self.extents[new] = extents
        return new

    def keeps(
        self, call: Call, spec: Spec, padded: Mapping[int, Mapping[str, Extent]], letter: str
    ) -> bool:
        if isinstance(call.op, MeshOp) and letter in spec.consecutive:
            # It counts entries from the first one, and is told their true number.
            return all(
                extents[letter].before == 1 for extents in padded.values() if letter in extents
            )
        return treats_apart(spec, letter) and _is_harmless(call, spec, padded, letter)


def _is_harmless(
    call: Call, spec: Spec, padded: Mapping[int, Mapping[str, Extent]], letter: str
) -> bool:
    """Whether a call gives finite numbers with finite slopes for pad entries along a letter."""
    found = frozenset(
        i
        for i, letters in padded.items()
        if letter in letters and call.operands[i].type.differentiable
    )
    if found <= frozenset().union(*spec.linear):
        return True
    elementwise = call.op in POINTWISE or is_pointwise(call.op)
    return elementwise and _is_finite(
        call.op, call.args, call.kwargs, tuple(operand.type for operand in call.operands), found
    )


@lru_cache(maxsize=1024)
def _is_finite(
    op: Any,
    args: tuple[Arg, ...],
    kwargs: tuple[tuple[str, Arg], ...],
    operands: tuple[TensorType, ...],
    padded: frozenset[int],
) -> bool:
    """Whether an elementwise operator and its derivatives are finite at each of the values that its
    padded operands may have; the others hold numbers of the model."""
    with torch.inference_mode(mode=False), torch.enable_grad(), torch.device("cpu"):
        points = torch.tensor(_POINTS, dtype=torch.float64)
        grids = iter(torch.meshgrid(*[points] * len(padded), indexing="ij"))
        tensors = [
            next(grids).clone().requires_grad_() if place in padded else _number(type.dtype)
            for place, type in enumerate(operands)
        ]
        try:
            named = {key: filled(value, tensors) for key, value in kwargs}
            result = op(*filled(args, tensors), **named)
        except RuntimeError:  # it does not take such numbers
            return False
        if not isinstance(result, Tensor):
            return False
        slopes: tuple[Tensor | None, ...] = ()
        if result.requires_grad:
            leaves = [tensor for tensor in tensors if tensor.requires_grad]
            slopes = torch.autograd.grad(result.sum(), leaves, allow_unused=True)
    return all(bool(x.isfinite().all()) for x in (result, *slopes) if x is not None)


def _number(dtype: torch.dtype) -> Tensor:
    """A number such as a model may hold."""
    fractions = dtype.is_floating_point or dtype.is_complex
    return torch.tensor(0.7, dtype=torch.float64) if fractions else torch.ones((), dtype=dtype)

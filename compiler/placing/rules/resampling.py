"""Rules of interpolation: batch and channels may be split, never the spatial dims."""

from __future__ import annotations

import torch

from meshwright.compiler.graph.ir import Op
from meshwright.compiler.placing.rules.notation import FIRST, Call, Spec, numbered
from meshwright.compiler.placing.rules.registry import rule

aten = torch.ops.aten

_NAMES = (
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)

INTERPOLATIONS: tuple[Op, ...] = tuple(
    getattr(getattr(aten, name), overload) for name in _NAMES for overload in ("default", "vec")
)
"""`interpolate(x, size, ...)`: linear in x."""

INTERPOLATIONS_BACKWARD: tuple[Op, ...] = tuple(
    getattr(aten, f"{name}_backward").default for name in _NAMES
)
"""`interpolate_backward(grad, output_size, input_size, ...)`."""


@rule(*INTERPOLATIONS, *INTERPOLATIONS_BACKWARD)
def _interpolate(call: Call) -> Spec:
    spatial = len(call.operands[0].type.shape) - 2
    before, after = numbered("X", spatial), numbered("Y", spatial)
    return Spec(
        (("n", "c", *before),),
        (("n", "c", *after),),
        whole=frozenset(before),
        linear=FIRST,
    )

"""The seed of a backward in float16: the loss scale, which may change between updates."""

from __future__ import annotations

from meshwright.compiler.graph.ir import MeshOp
from meshwright.compiler.placing.composite import BindingContext, Composite, Kernel, composite
from meshwright.compiler.placing.rules.notation import Row


@composite
class Scaled(Composite):
    """`loss_scale(seed)`: the seed times the loss scale of the run, the same on every rank."""

    op = MeshOp("loss_scale")
    rule = Row("... -> ...")

    def bind(self, binding: BindingContext) -> Kernel:
        scale = binding.scale
        return lambda seed: seed * scale.value

"""Random numbers that are hashes of the global element index: split in any way, and the same."""

from __future__ import annotations

import torch

from meshwright.compiler.graph.ir import Arg, MeshOp, NodeType, TensorType
from meshwright.compiler.kernels.random import random
from meshwright.compiler.placing.composite import BindingContext, Composite, Kernel, composite
from meshwright.compiler.placing.rules.notation import Call, Spec, numbered


@composite
class Random(Composite):
    """`random(like, shape, kind, dtype, op_id)`; `like` lends its layout alone, and may be None."""

    op = MeshOp("random")
    number = 4

    def rule(self, call: Call) -> Spec:
        """Split in any way, as the operand or a user is."""
        (result,) = call.results
        assert result is not None
        letters = numbered("r", len(result.shape))
        return Spec(
            tuple(letters for _ in call.operands),
            (letters,),
            shape_only=frozenset(range(len(call.operands))),
            free=frozenset(letters),
        )

    def result_type(
        self,
        like: TensorType | None,
        shape: tuple[int, ...],
        kind: str,
        dtype: torch.dtype,
        *rest: Arg,
    ) -> NodeType:
        return TensorType(tuple(shape), dtype)

    def bind(self, binding: BindingContext) -> Kernel:
        _, shape, kind, dtype, op_id = binding.node.args
        layout, device = binding.node.placed, binding.device
        index = binding.index(op_id, shape, binding.coordinates(layout.dims))
        local = layout.local_shape(binding.mesh)
        return lambda *_: random(local, kind, index(), dtype, device)

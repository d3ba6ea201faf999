"""Stand-ins for a model's tensors: shapes and types on the CPU, with no memory behind them.

Capture never reads a weight, so a model on `meta`, on a GPU or larger than this machine is captured
like any other, and the same graph comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class Fakes:
    """Makes stand-ins that `torch.export` takes for its own."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(
            shape_env=ShapeEnv(tracked_fakes=[]), allow_non_fake_inputs=True, export=True
        )

    def like(self, tensor: Tensor) -> Tensor:
        """A new tensor of the same shape, strides and type that shares memory with nothing."""
        with self.mode:
            fake = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
            )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    @contextmanager
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        """Let the model hold stand-ins, tied as its own tensors are; `put_back` undoes it."""
        made: dict[int, Tensor] = {}
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = self.like(tensor)
                    table[name] = made[id(tensor)]
        with tracing(TracingContext(self.mode)):
            yield

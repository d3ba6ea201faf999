"""Mark an activation in a model's `forward` with a layout: `layout(x, "[b@dp, s, d]")`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_CAPTURING: ContextVar[bool] = ContextVar("capturing", default=False)


@torch.library.custom_op("mesh::layout", mutates_args=())
def mark(x: Tensor, layout: str) -> Tensor:
    """A copy of `x`: an operator of torch's library may not return its own operand."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, layout: str) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


mark.register_autograd(_backward)

LAYOUT: torch._ops.OpOverload = torch.ops.mesh.layout.default
"""The operator that stands in a captured graph where `layout` was called."""


def layout(x: Tensor, layout: str) -> Tensor:
    """Ask for a layout of the activation `x`, in a model's own `forward`.

    While the model is compiled, `x` (any shape, any type) takes the `layout` there, which is
    written as in a plan's `shard` statement: `"[b@dp, s, d]"` has a name or a size for each dim.
    Anywhere else this is `x` itself, and the text is not read.
    `compile` raises `PlanError` for a layout that the mesh or the shape does not allow.
    """
    return mark(x, layout) if _CAPTURING.get() else x


@contextmanager
def capturing() -> Iterator[None]:
    """While this is open, `layout` leaves a node in the graph."""
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)

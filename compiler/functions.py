"""The functions that generated code calls for an operator: Python's own bindings, where they are
the operator exactly, cost a third less a call than its overload."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from meshwright.compiler.ir import MeshOp, Op

aten = torch.ops.aten


def _named(function: Callable[..., Any], name: str = "") -> tuple[str, Callable[..., Any]]:
    return (name or function.__name__, function)


_nn = torch._C._nn

FAST: dict[Op, tuple[str, Callable[..., Any]]] = {
    aten.linear.default: _named(_nn.linear, "linear"),
    aten.gelu.default: _named(_nn.gelu, "gelu"),
    aten.silu.default: _named(_nn.silu, "silu"),
    aten.view.default: _named(torch.reshape),
    aten.expand.default: _named(torch.Tensor.expand, "expand"),
    aten.sum.dim_IntList: _named(torch.sum),
    aten.transpose.int: _named(torch.transpose),
    aten.permute.default: _named(torch.permute),
    aten.unsqueeze.default: _named(torch.unsqueeze),
    aten.squeeze.dim: _named(torch.squeeze, "squeeze"),
    aten.select.int: _named(torch.select),
    aten.split.Tensor: _named(torch.Tensor.split, "split"),
    aten.unbind.int: _named(torch.unbind),
    aten.cat.default: _named(torch.cat),
    aten.ne.Scalar: _named(torch.ne),
    aten.where.self: _named(torch.where),
    aten.pow.Tensor_Scalar: _named(torch.pow),
    **{
        getattr(aten, name).Tensor: _named(getattr(torch, name))
        for name in ("add", "sub", "mul", "div")
    },
    **{
        getattr(aten, name).default: _named(getattr(torch, name))
        for name in (
            "mm", "bmm", "matmul", "addmm", "t", "neg", "rsqrt", "exp", "log", "tanh", "sum",
            "sin", "cos", "relu", "sigmoid",
        )
    },
}  # fmt: skip

IDENTITIES: frozenset[Op] = frozenset({aten.detach.default, aten.alias.default, MeshOp("vary")})
"""Operators that do nothing when a graph runs: no autograd is there to see them."""

"""Add up what the turns of a loop compute: the first that a rank takes writes over the total, the
others add."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meshwright.compiler.codegen.linking import RankContext, bind_adding
from meshwright.compiler.graph.ir import Node
from meshwright.compiler.kernels import products


def add_to(context: RankContext) -> Callable[[Tensor, Tensor], Tensor]:
    """`(total, value)` to the total, with the value in it."""
    return Tensor.copy_ if context.first else Tensor.add_


def add_product(context: RankContext) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`(total, a, b)` to the total, with the matrix product `a b` in it."""
    return _product if context.first else _add_product


def add_large_product(context: RankContext) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same as `add_product`, for a product that may be oneDNN's."""
    if not products.is_faster(context.device):
        return add_product(context)
    return _large_product if context.first else products.add_mm


def _large_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return products.mm(a, b, out=total)


def add_composite(node: Node, context: RankContext) -> Callable[..., Tensor]:
    """`(total, *operands)` to the total, with the composite's result in it."""
    add = bind_adding(node, context)
    return (lambda total, *operands: add(total.zero_(), *operands)) if context.first else add


def write_composite(node: Node, context: RankContext) -> Callable[..., Tensor]:
    """`(*operands, out=)` to `out`, with the composite's result in it."""
    add = bind_adding(node, context)
    return lambda *operands, out: add(out.zero_(), *operands)


def _product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=total)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(total, a, b, out=total)

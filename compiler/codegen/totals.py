"""Add up what the turns of a loop compute: the first that a rank takes writes over the total, the
others add."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meshwright.compiler.codegen.linking import RankContext


def add_to(context: RankContext) -> Callable[[Tensor, Tensor], Tensor]:
    """`(total, value)` to the total, with the value in it."""
    return Tensor.copy_ if context.first else Tensor.add_


def add_product(context: RankContext) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`(total, a, b)` to the total, with the matrix product `a b` in it."""
    return _product if context.first else _add_product


def _product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=total)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(total, a, b, out=total)

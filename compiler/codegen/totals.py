"""Add up what the turns of a loop compute: the first turn writes over the total, the others add."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meshwright.compiler.codegen.linking import RankContext


def add_to(context: RankContext) -> Callable[[Tensor, Tensor], Tensor]:
    """`(total, value)` to the total, with the value in it."""
    return Tensor.copy_ if _is_first(context) else Tensor.add_


def add_product(context: RankContext) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`(total, a, b)` to the total, with the matrix product `a b` in it."""
    return _product if _is_first(context) else _add_product


def _is_first(context: RankContext) -> bool:
    return not any(context.coords[axis] for axis in context.mesh.sequential)


def _product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=total)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(total, a, b, out=total)

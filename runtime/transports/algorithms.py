"""Collectives in plain torch operators: on a list of every member's tensor, or on received parts.

Reductions add in one order, given by the places in the group: every member gets the same bits,
whichever transport and algorithm moved the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meshwright.compiler.layout.collectives import Wire

HALF_TYPES = (torch.bfloat16, torch.float16)
COMBINE: dict[str, Callable[..., Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


def combine(parts: Sequence[Tensor], reduce: str, out: Tensor | None = None) -> Tensor:
    """The sum, maximum or minimum of `parts` in `out`, or a new tensor; half types round once.

    Neighbours are paired, then pairs, and so on: the order that recursive doubling has.
    """
    dtype = parts[0].dtype
    if len(parts) > 2 and reduce == "sum" and dtype in HALF_TYPES:
        total = combine([part.float() for part in parts], reduce)
        return total.to(dtype) if out is None else out.copy_(total)
    operation = COMBINE[reduce]
    level = list(parts)
    while len(level) > 2:
        odd = level[len(level) & ~1 :]
        # From the second round on the left of a pair is a buffer of this function's own.
        own = len(level) < len(parts)
        pairs = zip(level[::2], level[1::2], strict=False)
        level = [operation(a, b, out=a if own else None) for a, b in pairs] + odd
    if len(level) == 1:
        return level[0].clone() if out is None else out.copy_(level[0])
    if out is None and len(parts) > 2:
        out = level[0]
    return operation(*level, out=out)


def everyone(wire: Wire, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What each member receives, from what each gave, in the order of the group.

    No result shares memory with another or with an operand.
    """
    return _EVERYONE[wire.kind](wire, tensors)


def _copies(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def _all_reduce(wire: Wire, tensors: Sequence[Tensor]) -> list[Tensor]:
    return _copies(combine(tensors, wire.reduce), len(tensors))


def _all_gather(wire: Wire, tensors: Sequence[Tensor]) -> list[Tensor]:
    return _copies(torch.stack(tuple(tensors)), len(tensors))


def _reduce_scatter(wire: Wire, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [combine(parts, wire.reduce) for parts in zip(*map(torch.unbind, tensors), strict=True)]


def _all_to_all(wire: Wire, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack(parts) for parts in zip(*map(torch.unbind, tensors), strict=True)]


def _permute(wire: Wire, tensors: Sequence[Tensor]) -> list[Tensor]:
    size = len(tensors)
    return [tensors[(place - wire.shift) % size].clone() for place in range(size)]


def _broadcast(wire: Wire, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[wire.root].clone() for _ in tensors]


def _reduce(wire: Wire, tensors: Sequence[Tensor]) -> list[Tensor]:
    results = [torch.zeros_like(tensor) for tensor in tensors]
    results[wire.root] = combine(tensors, wire.reduce)
    return results


_EVERYONE: dict[str, Callable[[Wire, Sequence[Tensor]], list[Tensor]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "permute": _permute,
    "broadcast": _broadcast,
    "reduce": _reduce,
}

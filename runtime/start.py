"""What ranks agree on before the first step: the same weights, wherever each got them."""

from __future__ import annotations

import torch
from torch import Tensor

from meshwright.compiler.collectives import Wire
from meshwright.compiler.program import Program
from meshwright.runtime.rank import RankProgram, RankState

_WORDS = 1 << 20


def same_weights(state: RankState, program: Program) -> RankProgram:
    """Give every rank that holds a part the value of the group's first rank, as DDP does.

    Each process built its own model; without a common seed their values differ. Checksums are
    compared first, so that equal weights cost one small collective a set of axes.
    """
    by_axes: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor, axes in state.replicated(program):
        by_axes.setdefault(axes, []).append(tensor)
    for axes, tensors in sorted(by_axes.items()):
        sums = torch.stack([checksum(tensor) for tensor in tensors])
        every = yield Wire("all_gather", axes), sums
        for i, tensor in enumerate(tensors):
            if (every[:, i] != every[0, i]).any():
                tensor.copy_((yield Wire("broadcast", axes), tensor.contiguous()))


def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit sum over a tensor's bytes that depends on their order."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(data), _WORDS):
        part = data[start : start + _WORDS]
        places = torch.arange(start, start + len(part), device=tensor.device)
        total += (part * (2 * places + 1)).sum()
    return total

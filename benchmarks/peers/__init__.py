"""The peers, one file each: a `Peer` is a name and a function that does a whole training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

FEATURES = ("gathered", "vocab", "sequence")
"""The levels of tensor parallelism, beyond split linears and embedding: `gathered` gathers the
logits; `vocab` has a vocabulary-parallel loss instead; `sequence` has that and Megatron's sequence
parallelism.
"""


@dataclass
class Peer:
    """A way to train the model.

    `step(tokens, targets)` takes the global batch and does forward, backward, optimizer and
    `zero_grad`. It returns the loss or, if `loss_is_local`, this rank's part of it, such as the
    mean over its own rows: the loss is the mean over ranks. `elsewhere` gives the tensors between
    steps whose memory would be the host's if the device were another.
    """

    system: str
    feature: str
    step: Callable[[Tensor, Tensor], Tensor]
    loss_is_local: bool = False
    elsewhere: Callable[[], Iterable[Tensor]] = tuple

    @property
    def name(self) -> str:
        return f"{self.system} {self.feature}".strip()


def rows(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of a global batch."""
    names = mesh.mesh_dim_names or ()
    if "dp" not in names:
        return tensor
    return tensor.chunk(mesh["dp"].size())[mesh.get_local_rank("dp")]


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a number over all ranks, where each value is on equally many ranks."""
    value = value.detach().double()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def average(gradients: list[Tensor], mesh: DeviceMesh) -> None:
    """Replace gradients by their mean over the ranks of `mesh`, in one all-reduce."""
    reduce(gradients, mesh.get_group(), 1 / mesh.size())


def reduce(gradients: list[Tensor], group: dist.ProcessGroup, scale: float = 1.0) -> None:
    """Replace gradients by their scaled sum over `group`, in one all-reduce."""
    buffer = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(buffer, group=group)
    if scale != 1:
        buffer *= scale
    pieces = buffer.split([gradient.numel() for gradient in gradients])
    views = [piece.view_as(grad) for piece, grad in zip(pieces, gradients, strict=True)]
    torch._foreach_copy_(gradients, views)

"""One name for each parameter and buffer, and every other name that it goes by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class NamedTensors:
    """A model's parameters and buffers, each tensor once, under the first name that it has."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    aliases: dict[str, str]
    """The first name of its tensor, by every name that a tensor has."""

    @property
    def frozen(self) -> frozenset[str]:
        return frozenset(n for n, tensor in self.parameters.items() if not tensor.requires_grad)


def named_tensors(model: nn.Module) -> NamedTensors:
    """The table of `model`: tied weights are one tensor, however often they are registered."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for found, items in (
        (parameters, model.named_parameters(remove_duplicate=False)),
        (buffers, model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in items:
            aliases[name] = first.setdefault(id(tensor), name)
            found.setdefault(aliases[name], tensor)
    return NamedTensors(parameters, buffers, aliases)

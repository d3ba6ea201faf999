"""All that a checkpoint keeps of a run: to compare to the bit, or to fill with one number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import meshwright as mw


def snapshot(run: mw.Run, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """The bytes of every local tensor, the optimizer's options, and where random numbers are."""
    found: dict[str, Any] = {}
    for state in run.states:
        found[f"{state.rank} random"] = (state.random.seed, *state.progress)
        found[f"{state.rank} loss scale"] = astuple(state.loss_scale)
        for key, tensor in state.tensors.items():
            found[f"{state.rank} {key}"] = _bits(tensor)
    for number, group in enumerate(optimizer.param_groups if optimizer else ()):
        for option, value in group.items():
            if option != "params":
                found[f"group {number} {option}"] = _bits(value)
        for place, parameter in enumerate(group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                found[f"group {number} parameter {place} {key}"] = _bits(value)
    return found


def _bits(value: Any) -> Any:
    """The bytes of a tensor, or the kind and text of anything else, so that NaN equals itself."""
    if not isinstance(value, Tensor):
        return type(value).__name__, repr(value)
    whole = value.detach().contiguous().reshape(-1)
    return str(value.dtype), tuple(value.shape), bytes(whole.view(torch.uint8).numpy())


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs between two snapshots."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def fill(run: mw.Run, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Make all of the state that number: of two states mixed, both are seen."""
    with torch.no_grad():
        for tensor in _tensors(run, optimizer):
            tensor.fill_(number)
    for group in optimizer.param_groups:
        group["lr"] = float(number)
    for state in run.states:
        state.random.seed = state.random.step = state.num_updates = number


def numbers(run: mw.Run, optimizer: torch.optim.Optimizer) -> set[float]:
    """The numbers that the state is made of: one, if it is one state."""
    found = {float(group["lr"]) for group in optimizer.param_groups}
    for state in run.states:
        found |= {float(state.random.seed), *map(float, state.progress)}
    for tensor in _tensors(run, optimizer):
        found |= set(tensor.detach().unique().tolist())
    return found


def _tensors(run: mw.Run, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in run.states:
        yield from state.tensors.values()
    for kept in optimizer.state.values():
        yield from (value for value in kept.values() if isinstance(value, Tensor))


def shards(folder: Path) -> list[Path]:
    """The files with tensors in a folder and the folders below, in the order of their names."""
    return sorted(folder.rglob("*.safetensors"))

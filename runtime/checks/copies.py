"""Compare what multiple ranks hold copies of: weights, buffers, gradients, optimizer state.

A layout says which ranks hold the same part of a tensor. Checksums are compared first, in one small
collective; only tensors whose copies differ are then gathered, to say by how much.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from meshwright.compiler.layout.layout import uniform_blocks
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.runtime.errors import MismatchError, by_value, spell_ranks, verb
from meshwright.runtime.rank import RankProgram, RankState, Results
from meshwright.runtime.state.start import checksum
from meshwright.runtime.state.weights import stored_tensors

_SHOWN = 8
"""The number of tensors that an error names; the others are counted and not gathered."""


@dataclass(frozen=True, slots=True)
class Held:
    """A rank's part of a tensor, or a block of that part, and the axes that split it."""

    label: str
    tensor: Tensor
    split_axes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drift:
    """Copies of one tensor that differ: on which ranks, from which others, and by how much."""

    label: str
    ranks: tuple[int, ...]
    usual: tuple[int, ...]
    size: float


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a comparison: the first drifts, and the number of tensors that differ."""

    drifts: tuple[Drift, ...]
    num_tensors: int


def held(
    program: Program,
    state: RankState,
    optimizer: Optimizer | None,
    results: Results,
) -> list[Held]:
    """All that this rank holds, in the same order on every rank."""
    found: list[Held] = []
    for kind, stored in stored_tensors(program):
        found += _blocks(f"`{stored.name}`", state.tensors[kind, stored.name], stored, program)
    for name, parameter in state.parameters.items():
        if parameter.grad is not None:
            stored = program.parameters[name]
            found += _blocks(f"the gradient of `{name}`", parameter.grad, stored, program)
    if optimizer is not None:
        found += _optimizer_state(program, state, optimizer)
    for output, value in results.items():
        found.append(Held(f"the result `{output.label}`", value))
    counts = torch.tensor([state.random.seed, *state.progress])
    found.append(Held("the seed and the numbers of steps and updates", counts))
    scale = torch.tensor(astuple(state.loss_scale), dtype=torch.float64)
    found.append(Held("the loss scale", scale))
    return found


def _blocks(label: str, tensor: Tensor, stored: Stored, program: Program) -> Iterator[Held]:
    for block, axes in uniform_blocks(tensor, stored.layout, program.mesh):
        yield Held(label, block, axes)


def _optimizer_state(program: Program, state: RankState, optimizer: Optimizer) -> Iterator[Held]:
    for name, parameter in state.parameters.items():
        stored = program.parameters[name]
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            tensor = value if isinstance(value, Tensor) else _number(value)
            if tensor is None:
                continue
            label, shape = f"the optimizer's `{key}` of `{name}`", tuple(tensor.shape)
            if shape == stored.layout.local_shape(program.mesh):
                yield from _blocks(label, tensor, stored, program)
            elif not shape or not stored.layout.split_axes:
                yield Held(label, tensor)
    for number, group in enumerate(optimizer.param_groups):
        for key, value in sorted(group.items()):
            option = None if key == "params" else _number(value)
            if option is not None:
                yield Held(f"the optimizer's `{key}` in group {number}", option)


def _number(value: Any) -> Tensor | None:
    """A number, or a list of them, as a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    if all(isinstance(each, (bool, int, float)) for each in numbers):
        return torch.tensor([float(each) for each in numbers], dtype=torch.float64)
    return None


def compare(state: RankState, listed: Sequence[Held], tolerance: float) -> RankProgram:
    """The copies that differ by more than `tolerance`: a `Found`, the same on every rank."""
    every_axis, device = state.mesh.names, state.device
    text = "\0".join(f"{each.label} {tuple(each.tensor.shape)}" for each in listed)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    digests = yield Wire("all_gather", every_axis), torch.tensor([number], device=device)
    if len(set(digests.flatten().tolist())) > 1:
        return _other_tensors(digests.flatten().tolist())
    sums = torch.stack([checksum(each.tensor).to(device) for each in listed])
    every = (yield Wire("all_gather", every_axis), sums).T.tolist()
    differing = [each for each, row in zip(listed, every, strict=True) if _differ(row, each, state)]
    drifts: list[Drift] = []
    for each in differing[:_SHOWN]:
        copies = yield Wire("all_gather", every_axis), each.tensor.detach().to(device).contiguous()
        drifts += _drifts(each, copies.cpu(), state.mesh, tolerance)
    labels = {drift.label for drift in drifts}
    unseen = {each.label for each in differing[_SHOWN:]} - labels if drifts else set()
    return Found(tuple(drifts), len(labels) + len(unseen))


def _differ(sums: Sequence[int], held: Held, state: RankState) -> bool:
    groups = copy_groups(held.split_axes, state.mesh)
    return any(len({sums[rank] for rank in ranks}) > 1 for ranks in groups)


def _other_tensors(digests: Sequence[int]) -> Found:
    usual, *others = by_value(range(len(digests)), digests)
    ranks = tuple(sorted(itertools.chain(*others)))
    return Found((Drift("the list of gradients and optimizer state", ranks, usual, 0.0),), 1)


def _drifts(each: Held, copies: Tensor, mesh: Mesh, tolerance: float) -> Iterator[Drift]:
    """For each part of a tensor, the ranks whose copies differ from the most common one."""
    for ranks in copy_groups(each.split_axes, mesh):
        sums = [int(checksum(copies[rank])) for rank in ranks]
        usual, *others = by_value(ranks, sums)
        sizes = {rank: _distance(copies[rank], copies[usual[0]]) for own in others for rank in own}
        far = [rank for rank, size in sizes.items() if not size <= tolerance]
        if far:
            yield Drift(each.label, tuple(sorted(far)), usual, max(sizes[rank] for rank in far))


def _distance(ours: Tensor, theirs: Tensor) -> float:
    if not ours.numel():
        return 0.0
    wide = torch.complex128 if ours.is_complex() else torch.float64
    ours, theirs = ours.to(wide), theirs.to(wide)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return (ours - theirs).abs().masked_fill(same, 0.0).max().item()


def copy_groups(split_axes: Sequence[str], mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """The ranks that hold the same part of what is split over these axes."""
    return mesh.groups(tuple(axis for axis in mesh.names if axis not in split_axes))


def check_found(found: Found, rank: int) -> None:
    """Raise a `MismatchError` that names each tensor, its ranks and how far they differ."""
    if not found.drifts:
        return
    lines = [
        f"{drift.label}: {verb(drift.ranks, 'differs', 'differ')} from {spell_ranks(drift.usual)}"
        + (f" by up to {drift.size:.1e}" if drift.size else "")
        for drift in found.drifts[:_SHOWN]
    ]
    many = f"copies of {found.num_tensors} tensors differ"
    raise MismatchError(
        f"{'copies of one tensor differ' if found.num_tensors == 1 else many} between ranks",
        rank=rank,
        peers=tuple(sorted({each for drift in found.drifts for each in drift.ranks})),
        where=lines,
        help="give every rank the same inputs and calls; `run.load(...)` makes weights equal again",
    )

"""Compare what multiple ranks hold copies of: weights, buffers, gradients, optimizer state.

A layout says which ranks hold the same part of a tensor. Checksums are compared first, in one small
collective; only tensors whose copies differ are then gathered, to say by how much.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from meshwright.compiler.layout.layout import uniform_blocks
from meshwright.compiler.layout.mesh import Mesh, within
from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.runtime.errors import MismatchError, by_value, spell_ranks, verb
from meshwright.runtime.rank import RankProgram, RankState, Results
from meshwright.runtime.state.start import checksum
from meshwright.runtime.world.agreement import all_told

_SHOWN = 8
"""The number of tensors that an error names; the others are counted and not gathered."""


@dataclass(frozen=True, slots=True)
class Held:
    """A rank's part of a tensor, or a block of that part, the axes that split it, and by axis the
    coordinates whose ranks hold one."""

    label: str
    tensor: Tensor
    split_axes: tuple[str, ...] = ()
    held_at: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> list[Any]:
        """What other ranks need to know of it: `nothing` takes that, and the label."""
        kind = str(self.tensor.dtype).removeprefix("torch.")
        return [[*self.tensor.shape], kind, [*self.split_axes], dict(self.held_at)]

    @staticmethod
    def nothing(label: str, row: Sequence[Any]) -> Held:
        """What stands in the list of a rank for what it does not hold."""
        shape, kind, split_axes, held_at = row
        return Held(label, torch.zeros(shape, dtype=getattr(torch, kind)), split_axes, held_at)


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


def comparing(
    program: Program,
    states: Sequence[RankState],
    optimizer: Optimizer | None,
    results: Sequence[Results],
    tolerance: float,
) -> list[RankProgram]:
    """What each rank of this process does to compare all that it holds, and the last `results`
    where there are any, with what other ranks do."""
    return [
        compare(state, held(program, state, optimizer, own), tolerance)
        for state, own in zip(states, results or [{} for _ in states], strict=True)
    ]


def held(
    program: Program,
    state: RankState,
    optimizer: Optimizer | None,
    results: Results,
) -> list[Held]:
    """All that this rank holds, in the same order on every rank that holds the same."""
    found: list[Held] = []
    state.follow_written()
    for key, tensor in state.tensors.items():
        found += _blocks(f"`{key[1]}`", tensor, state.stored[key], program)
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
        yield Held(label, block, axes, stored.held_at)


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
                yield Held(label, tensor, (), stored.held_at)
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
    shared = [each for each in listed if not each.held_at]
    numbers = torch.tensor([_digest(shared), _digest(listed)], device=device)
    common, own = (yield Wire("all_gather", every_axis), numbers).T.tolist()
    if found := _other_tensors(common, (), state) or _other_tensors(own, state.apart, state):
        return found
    if len(state.holders) > 1:
        listed = yield from _of_all_ranks(state, listed)
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


def _digest(listed: Sequence[Held]) -> int:
    text = "\0".join(f"{each.label} {tuple(each.tensor.shape)}" for each in listed)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _of_all_ranks(state: RankState, listed: Sequence[Held]) -> RankProgram:
    """What any rank holds, in the same order on every rank; zeros for what this one does not."""
    own: dict[str, list[Held]] = {}
    for each in listed:
        own.setdefault(each.label, []).append(each)
    text = json.dumps({label: [each.to_json() for each in held] for label, held in own.items()})
    every: dict[str, list[Any]] = {}
    for said in (yield from all_told(state, text, state.holders)):
        every |= {label: rows for label, rows in json.loads(said).items() if label not in every}
    return [
        each
        for label, rows in every.items()
        for each in own.get(label, [Held.nothing(label, row) for row in rows])
    ]


def _differ(sums: Sequence[int], held: Held, state: RankState) -> bool:
    groups = copy_groups(held.split_axes, state.mesh, held.held_at)
    return any(len({sums[rank] for rank in ranks}) > 1 for ranks in groups)


def _other_tensors(digests: Sequence[int], apart: Sequence[str], state: RankState) -> Found | None:
    """The result where ranks that differ along other axes than `apart` alone list other tensors."""
    for ranks in copy_groups(apart, state.mesh):
        usual, *others = by_value(ranks, [digests[rank] for rank in ranks])
        if others:
            far = tuple(sorted(itertools.chain(*others)))
            return Found((Drift("the list of gradients and optimizer state", far, usual, 0.0),), 1)
    return None


def _drifts(each: Held, copies: Tensor, mesh: Mesh, tolerance: float) -> Iterator[Drift]:
    """For each part of a tensor, the ranks whose copies differ from the most common one."""
    for ranks in copy_groups(each.split_axes, mesh, each.held_at):
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


def copy_groups(
    split_axes: Sequence[str], mesh: Mesh, held_at: Mapping[str, Sequence[int]] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The ranks that hold the same part of what is split over these axes and, if that is given,
    held at these coordinates alone."""
    groups = mesh.groups(tuple(axis for axis in mesh.names if axis not in split_axes))
    held = (tuple(r for r in each if within(mesh.coords(r), held_at or {})) for each in groups)
    return tuple(filter(None, held))


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

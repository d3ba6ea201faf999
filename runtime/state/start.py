"""Agree before the first step on program, seed, weights and constants, wherever ranks got them."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from meshwright.compiler.layout.wires import Wire
from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.runtime.errors import RunError, check_kind
from meshwright.runtime.rank import RankProgram, RankState, Values
from meshwright.runtime.state.weights import stored_tensors
from meshwright.runtime.world.agreement import told

_BYTES = 1 << 19
"""That a checksum adds up at once. Copies of whole weights would make the launch the peak."""
_BLOCKS, _BLOCK, _SMALL = 16, 512, 1 << 16
"""Of a tensor of more elements than the last, so many blocks of so many stand for all of it."""


def check_seed(seed: object) -> None:
    """Raise `RunError` for a seed that is not a whole number of 64 bits."""
    check_kind(seed, int, "`seed`", "pass a whole number")
    assert isinstance(seed, int)
    if not -(2**63) <= seed < 2**63:
        raise RunError(f"`seed` is {seed}", help="pass a whole number below 2**63")


def executable_digest(program: Program, backend: str) -> str:
    """A hash of all that ranks must have in common: the program, and what runs it."""
    parts = (program.digest, program.mode, torch.__version__, backend)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def same_start(
    state: RankState, program: Program, values: Values, mapped: Container[str] = ()
) -> RankProgram:
    """Give every rank the seed and the weights of rank 0, as DDP does.

    Each process built its own model; without a common seed their values differ. Checksums of the
    global values are compared first, so that equal ones cost one small collective. Of those that
    are `mapped` from files, samples are compared: a rank is to read no more than it holds. Returns
    what rank 0 has no values of.
    """
    every_axis = state.mesh.names
    seed = torch.tensor([state.random.seed], dtype=torch.int64, device=state.device)
    state.random.seed = int((yield Wire("broadcast", every_axis), seed))
    without = (yield from told(state, "\n".join(without_values(program, values)))).split("\n")
    listed = [(kind, each) for kind, each in stored_tensors(program) if each.name not in without]
    yield from same_values(state, listed, values, mapped)
    return [name for name in without if name]


def without_values(program: Program, values: Values) -> list[str]:
    """The names of the parameters and buffers that have no values here."""
    return [stored.name for _, stored in stored_tensors(program) if values(stored).is_meta]


def same_values(
    state: RankState,
    listed: Sequence[tuple[str, Stored]],
    values: Values,
    mapped: Container[str] = (),
) -> RankProgram:
    """Give every rank the values of rank 0 for these parameters and buffers, where they differ."""
    compared = [
        _sample(values(stored)) if stored.name in mapped else values(stored) for _, stored in listed
    ]
    different = yield from _differing(state, compared)
    for (kind, stored), differs in zip(listed, different, strict=True):
        if differs:
            value = values(stored)
            if value.is_meta:
                value = torch.empty_like(value, device=state.device)
            value = value.to(state.device, stored.type.dtype).contiguous()
            value = yield Wire("broadcast", state.mesh.names), value
            if stored.held_by(state.coords):
                state.assign((kind, stored.name), state.local(value, stored))


def same_constants(state: RankState, constants: Mapping[str, Tensor]) -> RankProgram:
    """Tensors that capture found in the model, by name, with the values of rank 0.

    A rank that drew its own, by `torch.randn` in `__init__`, would compute something else.
    """
    found: dict[str, Tensor] = {}
    different = yield from _differing(state, list(constants.values()))
    for (name, constant), differs in zip(constants.items(), different, strict=True):
        own = constant.detach().to(state.device)
        found[name] = own
        if differs:
            found[name] = yield Wire("broadcast", state.mesh.names), own.contiguous()
    return found


def _differing(state: RankState, tensors: Sequence[Tensor]) -> RankProgram:
    """For each tensor, whether its checksum differs between ranks."""
    if not tensors:
        return []
    sums = torch.stack([checksum(tensor).to(state.device) for tensor in tensors])
    every = yield Wire("all_gather", state.mesh.names), sums
    return (every != every[0]).any(0).tolist()


def _sample(tensor: Tensor) -> Tensor:
    """Blocks of a large tensor, evenly from its first to its last element, in which no two sets of
    weights are equal as a rule; a small tensor is whole."""
    flat = tensor.detach().flatten()
    if len(flat) <= _SMALL:
        return flat
    starts = (place * (len(flat) - _BLOCK) // (_BLOCKS - 1) for place in range(_BLOCKS))
    return torch.cat([flat[start : start + _BLOCK] for start in starts])


def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit sum over a tensor's bytes that depends on their order; -1 without values."""
    if tensor.is_meta:
        return torch.tensor(-1, dtype=torch.int64)
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(data), _BYTES):
        part = data[start : start + _BYTES]
        part = nn.functional.pad(part, (0, -len(part) % 8)).view(torch.int64)
        places = torch.arange(start // 8, start // 8 + len(part), device=tensor.device)
        total += places.mul_(2).add_(1).mul_(part).sum()
    return total

"""Take over global tensors, or copy them into a model: all of them or none, on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.compiler.public import Program
from meshwright.runtime.errors import RunError, check_kind
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.state.start import same_values
from meshwright.runtime.state.weights import (
    check_lossless,
    check_state,
    check_values,
    held_tensors,
    listed,
    mapped_names,
    name_in,
    shapes_of,
    state_names,
    stored_tensors,
    values_of,
)
from meshwright.runtime.world.agreement import agree, agreed, told

_LIKE_COMPILED = "pass a model like the one compiled"


def take_over(program: Program, state: RankState, given: Any, *, same: bool) -> RankProgram:
    """Change what a rank holds to the tensors in `given`; all ranks take those of rank 0.

    With `same`, every rank is given the same ones. Nothing is changed where those of any rank do
    not fit the model.
    """
    names = yield from agreed(state, lambda: _checked(program, given), "load_state_dict")
    first = (yield from told(state, "\0".join(names))).split("\0")
    unlike = [f"`{name}`" for name in sorted(set(names) ^ set(first))]
    problem = f"the state has other tensors than that of rank 0: {listed(unlike)}"
    help = "pass the same names on every rank"
    yield from agree(state, RunError(problem, help=help) if unlike else None)
    values = values_of(program, given)
    which = [(kind, stored) for kind, stored in stored_tensors(program) if stored.name in names]
    for kind, stored in which:
        if stored.held_by(state.coords):
            state.assign((kind, stored.name), state.local(values(stored), stored))
        state.unset.pop(stored.name, None)
    if not same:
        yield from same_values(state, which, values, mapped_names(program, given))


def _checked(program: Program, given: Any) -> list[str]:
    """The names of the parameters and buffers that a dictionary has values for, once checked."""
    check_state(program, shapes_of(given, "the state"), "the state", needed=state_names(program))
    check_values(program, given, "the state")
    named = [
        (name, stored)
        for _, stored in stored_tensors(program)
        if (name := name_in(program, stored.name, given)) is not None
    ]
    check_lossless(
        ((name, given[name], stored.type.dtype) for name, stored in named),
        "the state does not fit the model",
    )
    return [stored.name for _, stored in named]


def targets_in(program: Program, model: Any) -> dict[str, Tensor]:
    """The tensors of a model to copy to. Raises `RunError` unless each can hold what is trained."""
    check_kind(model, nn.Module, "what to copy to", _LIKE_COMPILED)
    targets = held_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    where = "what to copy to"
    check_state(program, shapes, where, needed=state_names(program), help=_LIKE_COMPILED)
    owners: dict[int, str] = {}
    for name, tensor in targets.items():
        if tensor.is_meta:
            raise RunError(
                f"`{name}` of this model is on the meta device and holds no values",
                help='make room first: `model.to_empty(device="cpu")`',
            )
        own = program.captured.aliases[name]
        problem = _why_not(tensor)
        if owners.setdefault(id(tensor), own) != own:
            problem = f"is also `{owners[id(tensor)]}`, which was trained apart from it"
        if problem:
            raise RunError(f"`{name}` of this model {problem}", help=_LIKE_COMPILED)
    check_values(program, targets, where)
    return targets


def _why_not(tensor: Tensor) -> str:
    """Why a tensor cannot be written to; empty if it can."""
    if tensor.is_inference():
        return "was made under `torch.inference_mode` and cannot be written to"
    if tensor.layout is not torch.strided:
        return f"is {tensor.layout}"
    strides = zip(tensor.stride(), tensor.shape, strict=True)
    if any(not stride and size > 1 for stride, size in strides):
        return "is expanded: its elements share memory"
    return ""


def fill(
    state: RankState, targets: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> RankProgram:
    """Write values into the tensors of `targets_in`, once every rank's types can hold them."""
    where = "what to copy to does not fit what was trained"
    pairs = [(name, found[name], target.dtype) for name, target in targets.items()]
    yield from agreed(state, lambda: check_lossless(pairs, where))
    for name, target in targets.items():
        target.copy_(found[name])

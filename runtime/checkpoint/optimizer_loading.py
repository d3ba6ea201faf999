"""Read an optimizer's state and options, and check all of it before any of it is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from meshwright.compiler.graph.ir import TensorType
from meshwright.compiler.public import Program
from meshwright.runtime.checkpoint.header import dtype_of
from meshwright.runtime.checkpoint.manifest import MANIFEST, Manifest, SavedTensor
from meshwright.runtime.checkpoint.optimizer_state import (
    OPTIMIZER,
    check_owner,
    first_copies,
    names_of,
    tensor_name,
)
from meshwright.runtime.checkpoint.options import DAMAGED, check_kind_of, checked_options, put
from meshwright.runtime.checkpoint.parts import Entry, read_into
from meshwright.runtime.checkpoint.shards import Shards
from meshwright.runtime.errors import RunError
from meshwright.runtime.optimizers.optimizer import is_known
from meshwright.runtime.optimizers.rounding import update_dtype
from meshwright.runtime.rank import RankState
from meshwright.runtime.state.weights import listed

_TENSOR = torch.zeros(1)
"""Stands for any tensor that was kept where only its being a tensor counts."""
State = dict[Tensor, dict[str, Any]]
"""What an optimizer keeps of each parameter, as in `Optimizer.state`."""
_Entry = tuple[
    list[dict[str, Any]], list[list[str]], dict[str, list[str]], dict[str, dict[str, Any]]
]


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """What a checkpoint says of an optimizer, checked against the one that is to take it over.

    Names are those of the checkpoint; `own_names` maps those of the program to them.
    """

    own_names: Mapping[str, str]
    options: Sequence[Mapping[str, Any]]
    """What each group takes over."""
    kept: Mapping[str, Sequence[str]]
    """By parameter: the keys of what the optimizer kept of it."""
    numbers: Mapping[str, Mapping[str, Any]]
    """By parameter: what it kept that is not a tensor."""

    def give_options(self, optimizer: Optimizer) -> None:
        """Change the options of an optimizer to those that were saved."""
        for group, options in zip(optimizer.param_groups, self.options, strict=True):
            for name, value in options.items():
                group[name] = put(group[name], value) if name in group else value


def saved_optimizer(
    program: Program, states: Sequence[RankState], optimizer: Optimizer, manifest: Manifest
) -> SavedOptimizer:
    """Compare what was saved with `optimizer`. Raises `RunError` where it cannot be taken over."""
    check_owner(states, optimizer)
    saved, kind = manifest.optimizer, type(optimizer).__name__
    if saved is None:
        raise RunError(
            "the checkpoint was saved without its optimizer",
            help="load without `optimizer`, or save with it",
        )
    if saved.get("class") != kind:
        raise RunError(
            f"the checkpoint has the state of `{saved.get('class')}`, not of `{kind}`",
            help="load without `optimizer`, or make one of the saved class",
        )
    own_names = {alias: manifest.aliases.get(alias, "") for alias in program.captured.aliases}
    groups, names, kept, numbers = _read_entry(saved)
    _check_groups(optimizer, states, names, own_names)
    _check_kept(manifest, {name for group in names for name in group}, kept, numbers)
    _check_kinds(optimizer, states, kept, numbers)
    places = [f" in group {place}" if len(groups) > 1 else "" for place in range(len(groups))]
    options = [
        checked_options(group, given, place)
        for group, given, place in zip(optimizer.param_groups, groups, places, strict=True)
    ]
    return SavedOptimizer(own_names, options, kept, numbers)


def check_whole(manifest: Manifest) -> dict[str, list[str]]:
    """The keys of what the optimizer kept, by parameter; empty without an optimizer.

    Raises `RunError` unless all of it is there, and nothing else.
    """
    if manifest.optimizer is None:
        return {}
    _, names, kept, numbers = _read_entry(manifest.optimizer)
    _check_once(names)
    _check_kept(manifest, {name for group in names for name in group}, kept, numbers)
    return kept


def _read_entry(saved: Mapping[str, Any]) -> _Entry:
    """The optimizer's entry in a manifest: its groups, the names of their parameters, and what was
    kept of each: keys, and numbers by key. Raises `RunError` for one that cannot be read."""
    try:
        groups = [dict(group) for group in saved["groups"]]
        kept = {name: _texts(keys) for name, keys in saved["kept"].items()}
        numbers = {name: dict(given) for name, given in saved["numbers"].items()}
        names = [_texts(group["names"]) for group in groups]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"the optimizer's entry in the manifest cannot be read: {error!r}", help=DAMAGED
        ) from None
    return groups, names, kept, numbers


def _texts(found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise TypeError("a list of names is not one")
    if len(set(found)) != len(found):
        raise ValueError("a list of names has one twice")
    return found


def _check_groups(
    optimizer: Optimizer,
    states: Sequence[RankState],
    names: Sequence[Sequence[str]],
    own_names: Mapping[str, str],
) -> None:
    _check_once(names)
    own, held = states[0].stored, first_copies(states)
    elsewhere = {own_names[n] for kind, n in own if kind == "parameter" and n not in held}
    names = [[name for name in group if name not in elsewhere] for group in names]
    theirs = _places(names)
    groups = [names_of(group, states) for group in optimizer.param_groups]
    ours = _places([[own_names[name] for name in group] for group in groups])
    unlike = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if unlike or len(groups) != len(names):
        raise RunError(
            f"the optimizer's {_spell(groups)}, the checkpoint's {_spell(names)}",
            where=[
                f"`{name}`: {_spell_place(ours.get(name))} here, {_spell_place(theirs.get(name))} "
                "in the checkpoint"
                for name in unlike[:4]
            ],
            help="make the optimizer with the groups that it was saved with",
        )


def _check_once(names: Sequence[Sequence[str]]) -> None:
    if len(_places(names)) < sum(map(len, names)):
        raise RunError(
            "the checkpoint has a parameter in two groups of its optimizer", help=DAMAGED
        )


def _places(groups: Sequence[Sequence[str]]) -> dict[str, int]:
    """The group of each name."""
    return {name: place for place, group in enumerate(groups) for name in group}


def _spell_place(place: int | None) -> str:
    return "in no group" if place is None else f"in group {place}"


def _spell(groups: Sequence[Sequence[str]]) -> str:
    sizes = " and ".join(str(len(names)) for names in groups)
    return f"groups have {sizes} parameters" if len(groups) > 1 else f"group has {sizes} parameters"


def _check_kept(
    manifest: Manifest,
    owners: set[str],
    kept: Mapping[str, Sequence[str]],
    numbers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raise `RunError` unless all that was kept is there, and nothing else."""
    wanted = {(name, key) for name, keys in kept.items() for key in keys}
    plain = {(name, key) for name, given in numbers.items() for key in given}
    tensors = {tensor_name(key, name) for name, key in wanted - plain}
    there = {name for name in manifest.tensors if name.startswith(OPTIMIZER)}
    problems = [f"`{name}` is missing" for name in sorted(tensors - there)]
    problems += [f"`{name}` is unknown" for name in sorted(there - tensors)]
    problems += [f"`{key}` of `{name}` is unknown" for name, key in sorted(plain - wanted)]
    problems += [f"`{name}` is in no group" for name in sorted(kept.keys() - owners)]
    if problems:
        raise RunError(
            f"the optimizer's state in the checkpoint is not whole: {listed(problems)}",
            help=DAMAGED,
        )


def _check_kinds(
    optimizer: Optimizer,
    states: Sequence[RankState],
    kept: Mapping[str, Sequence[str]],
    numbers: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raise `RunError` where what was kept under one key is a tensor for one parameter and a number
    for another, or for the optimizer here, or another kind of number."""
    kinds: dict[str, Any] = {}
    for parameter in first_copies(states).values():
        for key, value in optimizer.state.get(parameter, {}).items():
            kinds.setdefault(key, value)
    for name, keys in kept.items():
        for key in keys:
            what = f"the optimizer's `{key}` of `{name}` in the checkpoint"
            value = numbers.get(name, {}).get(key, _TENSOR)
            own = kinds.setdefault(key, value)
            if value is None or own is None:
                continue
            if isinstance(value, Tensor) != isinstance(own, Tensor):
                found = "a tensor" if isinstance(value, Tensor) else "not a tensor"
                raise RunError(f"{what} is {found}, unlike the others", help=DAMAGED)
            if not isinstance(value, Tensor):
                check_kind_of(value, own, what)


def staged_state(
    program: Program,
    state: RankState,
    optimizer: Optimizer,
    saved: SavedOptimizer,
    manifest: Manifest,
    shards: Shards,
) -> State:
    """What the optimizer is to keep of each of this rank's parameters that it has; tensors are new.
    Empty for a parameter of which nothing was saved."""
    listed = {id(each) for group in optimizer.param_groups for each in group["params"]}
    found: State = {}
    for name, parameter in state.parameters.items():
        if id(parameter) in listed:
            own = saved.own_names[name]
            numbers = saved.numbers.get(own, {})
            found[parameter] = {
                key: numbers[key]
                if key in numbers
                else _tensor(program, state, name, (key, own), optimizer, manifest, shards)
                for key in saved.kept.get(own, ())
            }
    return found


def _tensor(
    program: Program,
    state: RankState,
    name: str,
    saved_as: tuple[str, str],
    optimizer: Optimizer,
    manifest: Manifest,
    shards: Shards,
) -> Tensor:
    """A tensor that an optimizer kept of a parameter: this rank's part if it has its shape.

    `saved_as` are its key, and the parameter's name in the checkpoint.
    """
    key, own = saved_as
    saved_name = tensor_name(key, own)
    parameter, saved = state.parameters[name], manifest.tensors[saved_name]
    stored = program.parameters[name]
    like = dtype_of(manifest.tensors[own].dtype)
    dtype = kept_dtype(program, optimizer, parameter, key, _type_of(saved), like)
    # A count of steps has the shape of a parameter of a single number.
    if saved.shape == stored.type.shape and key != "step":
        found = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        read_into(Entry.of(stored, found), saved_name, manifest, shards, state)
        return found
    if saved.shape and stored.layout.split_axes:
        raise RunError(
            f"`{saved_name}` is {list(saved.shape)} in the checkpoint, which is not the shape of "
            "its parameter, and that parameter is split here",
            where=(f"in `{shards.folder / MANIFEST}`",),
            help="load without `optimizer`, or under a plan that does not split it",
        )
    whole = shards.part(saved.owners[0], saved_name, saved.shape, dtype_of(saved.dtype))
    return whole.to(kept_device(parameter, optimizer, whole), dtype, copy=True)


def _type_of(saved: SavedTensor) -> TensorType:
    return TensorType(saved.shape, dtype_of(saved.dtype))


def kept_dtype(
    program: Program,
    optimizer: Optimizer,
    parameter: Tensor,
    key: str,
    kept: TensorType,
    like: torch.dtype,
) -> torch.dtype:
    """The type in which an optimizer is to have what was `kept` of a parameter that was `like`:
    that of its updates here, unless it is a number or of a type of its own."""
    follows = is_known(type(optimizer)) or kept.dtype == like
    is_number = key == "step" or (not kept.shape and bool(parameter.shape))
    widens = follows and kept.dtype.is_floating_point and not is_number
    return update_dtype(program, parameter) if widens else kept.dtype


def kept_device(parameter: Tensor, optimizer: Optimizer, value: Tensor) -> torch.device:
    """Where an optimizer keeps a value that is not of its parameter's shape."""
    here = bool(value.dim()) or _on_device(parameter, optimizer)
    return parameter.device if here else torch.device("cpu")


def _on_device(parameter: Tensor, optimizer: Optimizer) -> bool:
    """Whether torch keeps a parameter's step count on its device, and not on the CPU."""
    return any(
        group.get("fused") or group.get("capturable")
        for group in optimizer.param_groups
        if any(each is parameter for each in group["params"])
    )

"""An optimizer as a checkpoint holds it: its tensors as parts, all else in the manifest."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.public import Program
from meshwright.runtime.checkpoint.options import OWN_CHOICE, written
from meshwright.runtime.checkpoint.parts import Entry
from meshwright.runtime.errors import MismatchError, RunError, check_kind
from meshwright.runtime.rank import RankState

OPTIMIZER = "optimizer/"
"""The prefix of the names of an optimizer's tensors in a checkpoint."""
_WITHOUT = "save without the optimizer"
KeptTypes = dict[str, dict[str, tuple[list[int], str]]]
"""By parameter and key: the shape on a rank and the type of a tensor that an optimizer keeps."""


def check_optimizer(
    program: Program, states: Sequence[RankState], optimizer: Optimizer
) -> dict[str, Any]:
    """The optimizer's entry in the manifest: class, groups and numbers. Raises `RunError` for one
    that was not made by this run, or keeps what no checkpoint can hold."""
    check_owner(states, optimizer)
    groups = [
        {
            "names": names_of(group, states),
            **{
                key: written(value, f"the optimizer's option `{key}`")
                for key, value in group.items()
                if key != "params"
            },
        }
        for group in optimizer.param_groups
    ]
    numbers: dict[str, dict[str, Any]] = {}
    kept: dict[str, list[str]] = {}
    for name, parameter in first_copies(states).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            check_kind(key, str, f"what the optimizer keeps `{name}` under", _WITHOUT)
            kept.setdefault(name, []).append(key)
            if not isinstance(value, Tensor):
                what = f"the optimizer's `{key}` of `{name}`"
                numbers.setdefault(name, {})[key] = written(value, what)
            else:
                _entry(program, name, key, value)
    return {
        "class": type(optimizer).__name__, "groups": groups, "kept": kept, "numbers": numbers,
    }  # fmt: skip


def first_copies(states: Sequence[RankState]) -> dict[str, nn.Parameter]:
    """The parameters that ranks of this process hold, by name, each on the first of them."""
    return {name: p for state in reversed(states) for name, p in state.parameters.items()}


def joined(said: Sequence[dict[str, Any] | None], program: Program) -> dict[str, Any] | None:
    """One entry of what `check_optimizer` says on ranks that hold different parameters."""
    first, *others = said
    if first is None or None in others:
        return first
    found = {**first, "kept": {}, "numbers": {}, "groups": [dict(g) for g in first["groups"]]}
    for each in filter(None, said):
        for key in ("kept", "numbers"):
            found[key] = {**each[key], **found[key]}
        for group, more in zip(found["groups"], each["groups"], strict=False):
            either = {*group["names"], *more["names"]}
            group["names"] = [name for name in program.parameters if name in either]
    return found


def unlike_first(
    own: dict[str, Any] | None, first: dict[str, Any] | None, held: Container[str]
) -> RunError | None:
    """The error where `check_optimizer` says something else on this rank, of the parameters that it
    has `held`, than on the first that holds them.

    The manifest has what the first rank says: what another trained with would be lost.
    """
    kinds = ["without `optimizer`" if d is None else f"a `{d['class']}`" for d in (own, first)]
    if kinds[0] != kinds[1]:
        return MismatchError(
            f"this rank saves {kinds[0]}, and rank 0 {kinds[1]}",
            help="call `save` with the same arguments on every rank",
        )
    if own is None or first is None:
        return None
    for place, (ours, theirs) in enumerate(zip(own["groups"], first["groups"], strict=False)):
        for key in sorted({*ours, *theirs} - {*OWN_CHOICE}):
            if _differ(key, ours.get(key), theirs.get(key), held):
                return MismatchError(
                    f"`{key}` of the optimizer's group {place} is {_short(ours.get(key))} on this "
                    f"rank, and {_short(theirs.get(key))} on rank 0",
                    help="make the optimizer alike on every rank, and set the same options",
                )
    if len(own["groups"]) != len(first["groups"]):
        return MismatchError(
            f"the optimizer has {len(own['groups'])} groups on this rank, and "
            f"{len(first['groups'])} on rank 0",
            help="make the optimizer alike on every rank",
        )
    return None


def _differ(key: str, own: Any, first: Any, held: Container[str]) -> bool:
    """Whether an option of a group differs; names do if those differ that this rank holds."""
    if key == "names" and own is not None and first is not None:
        own, first = set(own), {name for name in first if name in held}
    return bool(own != first)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_owner(states: Sequence[RankState], optimizer: Optimizer) -> None:
    """Raise `RunError` for what is not an optimizer over parameters that these ranks hold."""
    check_kind(optimizer, Optimizer, "the optimizer", "pass what `run.optimizer(...)` gave")
    for group in optimizer.param_groups:
        names_of(group, states)


def kept_types(states: Sequence[RankState], optimizer: Optimizer) -> KeptTypes:
    """What the ranks of this process say of the tensors that an optimizer keeps."""
    return {
        name: {
            key: ([*value.shape], str(value.dtype).removeprefix("torch."))
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        for name, parameter in first_copies(states).items()
    }


def optimizer_entries(
    program: Program, state: RankState, optimizer: Optimizer, types: KeptTypes
) -> list[Entry]:
    """The tensors that an optimizer keeps, of this rank's parameters and of those that others hold,
    whose `types` they say."""
    return [entry for *_, entry in kept_entries(program, state, optimizer, types)]


def kept_entries(
    program: Program, state: RankState, optimizer: Optimizer, types: KeptTypes
) -> Iterator[tuple[str, str, Entry]]:
    """The same, each with its parameter and with the key under which the optimizer has it."""
    for name in program.parameters:
        held = state.parameters.get(name)
        kept = (
            {
                key: torch.empty(shape, dtype=getattr(torch, kind), device="meta")
                for key, (shape, kind) in types.get(name, {}).items()
            }
            if held is None
            else optimizer.state.get(held, {})
        )
        tensors = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
        yield from ((name, key, _entry(program, name, key, tensors[key])) for key in tensors)


def _entry(program: Program, name: str, key: str, value: Tensor) -> Entry:
    """What an optimizer keeps of a parameter: split as that is if it has its shape, else whole."""
    stored = program.parameters[name]
    label, shape = tensor_name(key, name), tuple(value.shape)
    if shape == stored.layout.local_shape(program.mesh):
        return Entry.of(stored, value, label)
    if shape and stored.layout.split_axes:
        raise RunError(
            f"the optimizer's `{key}` of `{name}` is {list(shape)}, which is not its parameter's "
            "shape, and that parameter is split",
            help="save without the optimizer, or use an elementwise one such as AdamW",
        )
    return Entry(label, shape, replicated(shape), value, held_at=stored.held_at)


def tensor_name(key: str, name: str) -> str:
    """The name in a checkpoint of what an optimizer keeps of a parameter under `key`."""
    return f"{OPTIMIZER}{key}/{name}"


def names_of(group: Mapping[str, Any], states: Sequence[RankState]) -> list[str]:
    """The names of a group's parameters in the program's order, each once however many ranks are
    here."""
    held = {id(p): name for state in states for name, p in state.parameters.items()}
    found = {held.get(id(parameter)) for parameter in group["params"]}
    if None in found:
        raise RunError(
            "the optimizer has a parameter that this run does not hold",
            help="make the optimizer with `run.optimizer(...)` of the same run",
        )
    return [name for kind, name in states[0].stored if kind == "parameter" and name in found]

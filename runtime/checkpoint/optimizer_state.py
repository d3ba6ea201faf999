"""What an optimizer keeps, in a checkpoint: tensors as parts, all else in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from meshwright.compiler.layout import replicated
from meshwright.compiler.program import Program
from meshwright.runtime.checkpoint.header import dtype_of
from meshwright.runtime.checkpoint.manifest import Manifest
from meshwright.runtime.checkpoint.parts import Entry, read_into
from meshwright.runtime.checkpoint.shards import Shards
from meshwright.runtime.errors import RunError, check_kind
from meshwright.runtime.rank import RankState

_PLAIN = (bool, int, float, str, type(None))


def check_optimizer(
    program: Program, states: Sequence[RankState], optimizer: Optimizer
) -> dict[str, Any]:
    """What the manifest says of it: class, groups and numbers. Raises `RunError` for one that was
    not made by this run, or keeps what no checkpoint can hold."""
    check_owner(states, optimizer)
    state = states[0]
    groups = [
        {
            "names": _names(group, states),
            **{key: _option(value) for key, value in group.items() if key != "params"},
        }
        for group in optimizer.param_groups
    ]
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in state.parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                numbers.setdefault(name, {})[key] = _option(value)
            else:
                _entry(program, name, key, value)
    return {"class": type(optimizer).__name__, "groups": groups, "numbers": numbers}


def check_owner(states: Sequence[RankState], optimizer: Optimizer) -> None:
    """Raise `RunError` for what is no optimizer, or one of parameters that these ranks lack."""
    check_kind(optimizer, Optimizer, "the optimizer", "pass what `run.optimizer(...)` gave")
    for group in optimizer.param_groups:
        _names(group, states)


def optimizer_entries(program: Program, state: RankState, optimizer: Optimizer) -> list[Entry]:
    """The tensors that an optimizer keeps on this rank."""
    return [
        _entry(program, name, key, value)
        for name, parameter in state.parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    ]


def restore(
    program: Program,
    states: Sequence[RankState],
    optimizer: Optimizer,
    manifest: Manifest,
    shards: Shards,
) -> None:
    """Give an optimizer the state and the options that were saved."""
    saved = manifest.optimizer
    if saved is None:
        raise RunError(
            "the checkpoint was saved without its optimizer",
            help="load without `optimizer`, or save with it",
        )
    if saved.get("class") != type(optimizer).__name__:
        raise RunError(
            f"the checkpoint has the state of `{saved.get('class')}`, "
            f"not of `{type(optimizer).__name__}`",
            help="load without `optimizer`, or make one of the saved class",
        )
    own_names = {alias: manifest.aliases.get(alias, "") for alias in program.captured.aliases}
    try:
        _restore_options(optimizer, states, saved["groups"], own_names)
        numbers = dict(saved["numbers"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"the optimizer's entry in the manifest cannot be read: {error!r}",
            help="load without `optimizer`: this checkpoint is damaged",
        ) from None
    kept = _kept(manifest)
    for state in states:
        for name in state.parameters:
            own = own_names[name]
            found = {**numbers.get(own, {}), **_tensors(program, state, name, kept.get(own, {}),
                                                        optimizer, manifest, shards)}  # fmt: skip
            if found:
                optimizer.state[state.parameters[name]] = found


def _kept(manifest: Manifest) -> dict[str, dict[str, str]]:
    """By parameter: what was kept for it, and the name that has in the checkpoint."""
    found: dict[str, dict[str, str]] = {}
    for name in manifest.tensors:
        kind, _, rest = name.partition("/")
        key, _, owner = rest.partition("/")
        if kind == "optimizer" and owner:
            found.setdefault(owner, {})[key] = name
    return found


def _tensors(
    program: Program,
    state: RankState,
    name: str,
    kept: Mapping[str, str],
    optimizer: Optimizer,
    manifest: Manifest,
    shards: Shards,
) -> dict[str, Tensor]:
    """What an optimizer kept for one parameter, cut for this rank."""
    parameter, found = state.parameters[name], {}
    for key, saved_name in kept.items():
        saved = manifest.tensors[saved_name]
        if saved.shape == program.parameters[name].type.shape:
            found[key] = torch.zeros_like(
                parameter, dtype=dtype_of(saved.dtype), requires_grad=False
            )
            entry = Entry.of(program.parameters[name], found[key])
            read_into(entry, saved_name, manifest, shards, state)
        else:
            whole = shards.part(saved.owners[0], saved_name, saved.shape, dtype_of(saved.dtype))
            device = parameter.device if whole.dim() or _on_device(parameter, optimizer) else "cpu"
            found[key] = whole.to(device, copy=True)
    return found


def _on_device(parameter: Tensor, optimizer: Optimizer) -> bool:
    """Whether torch keeps a parameter's step count beside it, and not on the CPU."""
    return any(
        group.get("fused") or group.get("capturable")
        for group in optimizer.param_groups
        if any(each is parameter for each in group["params"])
    )


def _restore_options(
    optimizer: Optimizer,
    states: Sequence[RankState],
    saved: Sequence[Mapping[str, Any]],
    own_names: Mapping[str, str],
) -> None:
    groups = optimizer.param_groups
    ours = [sorted(own_names[name] for name in _names(group, states)) for group in groups]
    theirs = [sorted(group["names"]) for group in saved]
    if ours != theirs:
        raise RunError(
            f"the optimizer's {_spell(ours)}, the checkpoint's {_spell(theirs)}",
            help="make the optimizer with the groups that it was saved with",
        )
    for group, options in zip(groups, saved, strict=True):
        for key in options.keys() & group.keys():
            value = options[key]
            if isinstance(group[key], Tensor):
                group[key].fill_(value)
            else:
                group[key] = tuple(value) if isinstance(value, list) else value


def _spell(groups: Sequence[Sequence[str]]) -> str:
    sizes = " and ".join(str(len(names)) for names in groups)
    return f"groups have {sizes} parameters" if len(groups) > 1 else f"group has {sizes} parameters"


def _entry(program: Program, name: str, key: str, value: Tensor) -> Entry:
    """Something of a parameter's shape is cut as it is; numbers are the same on every rank."""
    stored = program.parameters[name]
    label, shape = f"optimizer/{key}/{name}", tuple(value.shape)
    if shape == stored.layout.local_shape(program.mesh):
        return Entry.of(stored, value, label)
    if shape and stored.layout.split_axes:
        raise RunError(
            f"the optimizer's `{key}` of `{name}` is {list(shape)}, which is not its parameter's "
            "shape, and that parameter is split",
            help="save without the optimizer, or use an elementwise one such as AdamW",
        )
    return Entry(label, shape, replicated(shape), value)


def _names(group: Mapping[str, Any], states: Sequence[RankState]) -> list[str]:
    """The names of a group's parameters, each once however many ranks are here."""
    held = {id(p): name for state in states for name, p in state.parameters.items()}
    found = [held.get(id(parameter)) for parameter in group["params"]]
    if None in found:
        raise RunError(
            "the optimizer has a parameter that this run does not hold",
            help="make the optimizer with `run.optimizer(...)` of the same run",
        )
    return list(dict.fromkeys(name for name in found if name is not None))


def _option(value: Any) -> Any:
    """An option as JSON can hold it."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_option(item) for item in value]
    if isinstance(value, _PLAIN):
        return value
    raise RunError(
        f"the optimizer holds a `{type(value).__name__}`, which a checkpoint cannot",
        help="save without the optimizer",
    )

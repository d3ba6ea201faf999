"""What a checkpoint has of an optimizer: its tensors as parts, all else in the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from meshwright.compiler.layout import replicated
from meshwright.compiler.program import Program
from meshwright.runtime.checkpoint.options import written
from meshwright.runtime.checkpoint.parts import Entry
from meshwright.runtime.errors import RunError, check_kind
from meshwright.runtime.rank import RankState

OPTIMIZER = "optimizer/"
"""How the names of an optimizer's tensors begin in a checkpoint."""
_WITHOUT = "save without the optimizer"


def check_optimizer(
    program: Program, states: Sequence[RankState], optimizer: Optimizer
) -> dict[str, Any]:
    """What the manifest says of it: class, groups and numbers. Raises `RunError` for one that was
    not made by this run, or keeps what no checkpoint can hold."""
    check_owner(states, optimizer)
    state = states[0]
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
    for name, parameter in state.parameters.items():
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


def check_owner(states: Sequence[RankState], optimizer: Optimizer) -> None:
    """Raise `RunError` for what is no optimizer, or one of parameters that these ranks lack."""
    check_kind(optimizer, Optimizer, "the optimizer", "pass what `run.optimizer(...)` gave")
    for group in optimizer.param_groups:
        names_of(group, states)


def optimizer_entries(program: Program, state: RankState, optimizer: Optimizer) -> list[Entry]:
    """The tensors that an optimizer keeps on this rank."""
    return [
        _entry(program, name, key, value)
        for name, parameter in state.parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    ]


def _entry(program: Program, name: str, key: str, value: Tensor) -> Entry:
    """Something of a parameter's shape is cut as it is; numbers are the same on every rank."""
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
    return Entry(label, shape, replicated(shape), value)


def tensor_name(key: str, name: str) -> str:
    """The name in a checkpoint of what an optimizer keeps of a parameter under `key`."""
    return f"{OPTIMIZER}{key}/{name}"


def names_of(group: Mapping[str, Any], states: Sequence[RankState]) -> list[str]:
    """The names of a group's parameters, each once however many ranks are here."""
    held = {id(p): name for state in states for name, p in state.parameters.items()}
    found = [held.get(id(parameter)) for parameter in group["params"]]
    if None in found:
        raise RunError(
            "the optimizer has a parameter that this run does not hold",
            help="make the optimizer with `run.optimizer(...)` of the same run",
        )
    return list(dict.fromkeys(name for name in found if name is not None))

"""Hand what a run and its optimizer hold to those of a program with layers apart.

Layers that shared parameters each get a copy of them, and of what the optimizer keeps of them. One
global tensor at a time is gathered from the ranks that have it, and each rank of the other program
takes its part: so that may have any other plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from meshwright.compiler.graph.ir import TensorType
from meshwright.compiler.layout.layout import shard
from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.dsl.errors import spelled
from meshwright.dsl.plan import Plan
from meshwright.dsl.selectors import quote_segment
from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.checkpoint.optimizer_loading import kept_device, kept_dtype
from meshwright.runtime.checkpoint.optimizer_state import (
    check_optimizer,
    joined,
    kept_entries,
    kept_types,
)
from meshwright.runtime.checkpoint.options import OWN_CHOICE
from meshwright.runtime.errors import RunError, check_kind
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.state.gather import gathered_all
from meshwright.runtime.state.weights import stored_tensors
from meshwright.runtime.world.agreement import agreed, all_told


@dataclass(frozen=True, slots=True)
class Options:
    """What a run was launched with, and goes on with."""

    new_shapes: str
    inputs: int
    """The interval in which inputs are compared; 0 is never."""
    finite: int
    """The interval in which updates are checked."""
    backend: str


@dataclass(frozen=True, slots=True)
class Side:
    """A program, and the states of its ranks in this process."""

    program: Program
    states: Sequence[RankState]


@dataclass(frozen=True, slots=True)
class OptimizerSide:
    """An optimizer, and the run that it is of."""

    side: Side
    optimizer: Optimizer


@dataclass(frozen=True, slots=True)
class Made:
    """How an optimizer was made: what `Run.optimizer` was given, without its groups."""

    kind: Callable[..., Optimizer]
    options: Mapping[str, Any]


def delinked(run: Any, optimizer: Any, plan: Any, state: Any) -> tuple[Any, Any]:
    """A run that goes on in place of this one with layers apart, and an optimizer in place of its;
    see `Run.delink`."""
    _check_arguments(run.program, optimizer, run._made, plan, state)
    program = run.program.delinked(plan)
    _check_apart(run.program, program)
    found = object.__new__(type(run))
    before = Side(run.program, run.states)

    def start() -> None:
        run._run(_move_tensors(before, Side(program, found.states)))

    with apart_from_caller(program.device.type):
        found._begin(program, _valueless, start, run._options)
    try:
        other = None if optimizer is None else _optimizer(run, optimizer, found, state)
    except BaseException:
        found._close()
        raise
    run._finite_check.hand_on(found._finite_check)
    _end(run, found)
    return found, other


def _optimizer(run: Any, optimizer: Optimizer, found: Any, state: str) -> Optimizer:
    """An optimizer of the run `found` that goes on for one of `run`."""
    before = OptimizerSide(Side(run.program, run.states), optimizer)
    entry, types = run._run([_said(before, each) for each in run.states])[0]
    made, groups = run._made[optimizer], _groups(run.program, found.program, entry)
    other: Optimizer = found.optimizer(made.kind, groups=groups, **made.options)
    _copy_options(optimizer, other)
    if state == "copy":
        after = OptimizerSide(Side(found.program, found.states), other)
        run._run([_move_kept(before, each, after, entry, types) for each in run.states])
    return other


def _end(run: Any, other: Any) -> None:
    """End a run and its optimizers, in whose place `other` goes on."""
    run._close()
    for optimizer in list(run._made):
        vars(optimizer).clear()
        optimizer.__class__ = _EndedOptimizer
    vars(run).clear()
    vars(run)["_other"] = other
    run.__class__ = _EndedRun


def _check_apart(program: Program, other: Program) -> None:
    """Raise `RunError` unless layers of `other` share no parameters that are apart in `program`."""
    before, after = program.captured.aliases, other.captured.aliases
    for alias, own in after.items():
        if before[alias] != before[own]:
            raise RunError(
                f"under this plan `{alias}` is one parameter with `{own}`, and here it is another",
                help="pass a plan under which no more layers share parameters than before",
            )


def _check_arguments(
    program: Program,
    optimizer: Any,
    made: Mapping[Optimizer, Made],
    plan: object,
    state: object,
) -> None:
    """Raise `RunError` for a program that has nothing to delink, and for wrong arguments."""
    if not program.shared:
        raise RunError(
            "no layers share parameters under this plan: there is nothing to delink",
            help="write `share` in the plan, such as `share blocks.*`",
        )
    if optimizer is not None:
        check_kind(optimizer, Optimizer, "the optimizer", "pass what `run.optimizer(...)` gave")
        if optimizer not in made:
            raise RunError(
                "this optimizer was not made by `optimizer` of this run",
                help="delink without it, and make one for the run that `delink` returns",
            )
    if plan is not None:
        check_kind(plan, Plan, "`plan`", "read it: `Plan.parse(text)` or `Plan.load(path)`")
    if state not in ("copy", "reset"):
        raise RunError(
            f"`state` is {spelled(state)}",
            help='write `state="copy"` for the moments of the shared layers, or `"reset"` for none',
        )


def _move_tensors(before: Side, after: Side) -> list[RankProgram]:
    """What each rank of `before` does so that those of `after` have its parameters and buffers,
    random numbers, counts and loss scale."""
    return [_moved(before, state, after) for state in before.states]


def _moved(before: Side, state: RankState, after: Side) -> RankProgram:
    first = state is before.states[0]  # of this process, where every rank finds the same
    copies = _copies(before, after)
    for kind, stored in stored_tensors(before.program):
        found = yield from gathered_all([stored], _of_kind(kind), state)
        for target, copy in copies(stored.name) if first else ():
            target.assign((kind, copy.name), target.local(found[stored.name], copy))
    for target in after.states if first else ():
        target.random.seed, target.random.step = state.random.seed, state.random.step
        target.num_updates = state.num_updates
        for name, value in asdict(state.loss_scale).items():
            setattr(target.loss_scale, name, value)


def _given(part: Tensor) -> Callable[[RankState, Stored], Tensor | None]:
    return lambda state, stored: None if part.is_meta else part


def _of_kind(kind: str) -> Callable[[RankState, Stored], Tensor | None]:
    return lambda state, stored: state.tensors.get((kind, stored.name))


def _copies(before: Side, after: Side) -> Callable[[str], Iterator[tuple[RankState, Stored]]]:
    """Finds the states that hold a part of a copy of a tensor of `before`, and which copy."""
    names: dict[str, list[Stored]] = {}
    for _, stored in stored_tensors(after.program):
        names.setdefault(before.program.captured.aliases[stored.name], []).append(stored)

    def copies(name: str) -> Iterator[tuple[RankState, Stored]]:
        for target in after.states:
            yield from ((target, copy) for copy in names[name] if copy.held_by(target.coords))

    return copies


def _said(before: OptimizerSide, state: RankState) -> RankProgram:
    """What an optimizer is on all ranks: its groups with the names of their parameters, what it
    keeps of each that is a number, and the types of what is a tensor."""
    program, states = before.side.program, before.side.states

    def own() -> str:
        entry = check_optimizer(program, states, before.optimizer)
        return json.dumps([entry, kept_types(states, before.optimizer)])

    text = yield from agreed(state, own, "delink")
    every = [json.loads(each) for each in (yield from all_told(state, text, state.holders))]
    entry = joined([each[0] for each in every], program)
    return entry, {name: kept for each in every for name, kept in each[1].items()}


def _groups(
    program: Program, other: Program, entry: Mapping[str, Any]
) -> list[dict[str, list[str]]]:
    """The groups of an optimizer over the copies of what is in each group of `entry`."""
    own = program.captured.aliases
    return [
        {
            "params": [
                ".".join(map(quote_segment, name.split(".")))
                for name, stored in other.parameters.items()
                if stored.requires_grad and own[name] in group["names"]
            ]
        }
        for group in entry["groups"]
    ]


def _copy_options(before: Optimizer, after: Optimizer) -> None:
    """Give the groups of an optimizer the options that those of another have now."""
    for group, other in zip(after.param_groups, before.param_groups, strict=True):
        for name, value in other.items():
            if name not in ("params", "param_names", *OWN_CHOICE):
                group[name] = value.clone() if isinstance(value, Tensor) else value


def _move_kept(
    before: OptimizerSide,
    state: RankState,
    after: OptimizerSide,
    entry: Mapping[str, Any],
    types: Any,
) -> RankProgram:
    """What a rank does so that the optimizer of `after` has what that of `before` keeps."""
    first = state is before.side.states[0]
    copies = _copies(before.side, after.side)
    program = before.side.program
    for name, key, each in kept_entries(program, state, before.optimizer, types):
        type = TensorType(each.shape, each.tensor.dtype)
        stored = replace(
            program.parameters[name], type=type, layout=each.layout, paddings=each.paddings
        )
        found = yield from gathered_all([stored], _given(each.tensor), state)
        for target, copy in copies(name) if first else ():
            _keep(after, target, copy, key, found[name], program.parameters[name].type.dtype)
    for name, numbers in entry["numbers"].items() if first else ():
        for target, copy in copies(name):
            after.optimizer.state[target.parameters[copy.name]].update(numbers)


def _keep(
    after: OptimizerSide,
    target: RankState,
    copy: Stored,
    key: str,
    value: Tensor,
    like: torch.dtype,
) -> None:
    """Let an optimizer keep a rank's part of a tensor that has its parameter's shape, or all of
    another one."""
    parameter, optimizer = target.parameters[copy.name], after.optimizer
    kept = TensorType.of(value)
    dtype = kept_dtype(after.side.program, optimizer, parameter, key, kept, like)
    if kept.shape == copy.type.shape and key != "step":
        part = shard(copy.padded(value), copy.layout, target.mesh, target.coords)
        held = torch.empty_like(parameter, dtype=dtype, requires_grad=False).copy_(part)
    elif kept.shape and copy.layout.split_axes:
        raise RunError(
            f"the optimizer's `{key}` of `{copy.name}` is {list(kept.shape)}, which is not its "
            "parameter's shape, and that parameter is split",
            help='delink with `state="reset"`',
        )
    else:
        held = value.to(kept_device(parameter, optimizer, value), dtype, copy=True)
    optimizer.state[parameter][key] = held


def _valueless(stored: Stored) -> Tensor:
    """A stand-in for the value of a tensor that is given one later."""
    return torch.empty(stored.type.shape, dtype=stored.type.dtype, device="meta")


class _EndedRun:
    """A run that has ended by `delink`: whatever is asked of it raises `RunError`."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name == "close":
            return object.__getattribute__(self, name)
        raise RunError(f"this run was delinked, and has no `{name}` any more", help=_USE_RUN)

    def __repr__(self) -> str:
        return "<Run: delinked>"

    def close(self) -> None:
        """Do nothing: it is closed."""

    def __enter__(self) -> NoReturn:
        raise RunError("this run was delinked", help=_USE_RUN)

    def __exit__(self, *ended: object) -> None:
        """Do nothing: `__enter__` raises."""

    def _leave(self, error: BaseException | None) -> None:
        """End the run in whose place another goes on, which may have ended alike by now."""
        other = vars(self)["_other"]
        type(other)._leave(other, error)


_USE_RUN = "use the run that `delink` returned: `run, optimizer = run.delink(optimizer)`"


class _EndedOptimizer(Optimizer):
    """An optimizer of a run that was delinked: whatever is asked of it raises `RunError`."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise RunError(
            f"this optimizer is of a run that was delinked, and has no `{name}` any more",
            help="use the optimizer that `delink` returned, and make schedulers for that one",
        )

    def __setattr__(self, name: str, value: object) -> None:
        getattr(self, name)

    def __repr__(self) -> str:
        return "<Optimizer: delinked>"

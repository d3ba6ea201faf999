"""Stop before an optimizer takes a NaN or an infinity, and say which node made it.

Before an update, ranks agree on whether the losses and gradients of the steps since the last one
are finite: one pass over the flat gradients and one small all-reduce, or nothing where clipping has
just found a finite norm. Where they are not, the steps run again with their values watched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from meshwright.compiler.layout.wires import HALF_TYPES, Wire
from meshwright.compiler.public import Program
from meshwright.dsl.errors import spelled
from meshwright.runtime.checks.culprit import Watches, culprit
from meshwright.runtime.errors import NonFiniteError, RunError
from meshwright.runtime.executor import Executor, Snapshot
from meshwright.runtime.optimizers.scaling import LossScaler
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.stepping import Ranks, Run, begun

_MOST_STEPS = 64
"""Steps before one update that can run again; their inputs stay in memory until then."""


def read_check(check_finite: object) -> int:
    """The interval that `launch(check_finite=...)` asks for; 0 is never. Raises `RunError`."""
    if not isinstance(check_finite, int) or check_finite < 0:
        raise RunError(
            f"`check_finite` is {spelled(check_finite)}",
            help="write `True`, `False`, or a number of updates from one check to the next",
        )
    return int(check_finite)


@dataclass(slots=True)
class Step:
    """What it takes to run a step again: what was run, with which inputs, and from where."""

    program: Program
    ranks: Ranks
    inputs: Sequence[Tensor]
    before: list[Snapshot]
    """Where each rank stood."""
    loss: Tensor = field(init=False)


class FiniteCheck:
    """A check of what steps have computed, before one in `interval` updates or, if it is 0, never.

    Where gradients are `scaled`, every update is checked: one whose gradients overflow under finite
    losses is skipped, and the loss scale lowered.
    """

    def __init__(self, states: Sequence[RankState], run: Run, interval: int, scaled: bool) -> None:
        self._states, self._run, self._interval = states, run, interval
        self.scaler = LossScaler(states, scaled)
        self._skips = False
        """Whether updates are skipped until the next step."""
        self._steps: deque[Step] = deque(maxlen=_MOST_STEPS)
        self._norm: Tensor | None = None
        """The norm of the gradients, if it was taken after the last step."""
        self._checked = False
        """Whether an update since the last step has checked already."""
        self._num_updates = 0

    def begin(self, program: Program, ranks: Ranks, inputs: Sequence[Tensor]) -> Step | None:
        """What is needed to run a step again, before it runs; None if it never will."""
        if not self._interval:
            return None
        return Step(program, ranks, inputs, [executor.snapshot() for executor, _ in ranks])

    def end(self, step: Step | None, loss: Tensor) -> None:
        """Count a step that has run, with its loss."""
        if step is not None:
            step.loss = loss
            self._steps.append(step)
        self._norm, self._checked = None, False

    def hand_on(self, other: FiniteCheck) -> None:
        """Let the check of a run that goes on in place of this one count on."""
        other._num_updates = self._num_updates

    def clipped(self, norm: Tensor) -> None:
        """Note the norm of all gradients, the same on every rank."""
        self._norm = norm

    def attach(self, optimizer: Optimizer) -> None:
        """Look before each update of an optimizer, and count those that are made."""
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_update)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        """Look now, or after each call of the closure that a step is given."""
        own, closure = args[:1], kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return self.before_update(optimizer)

        def checked() -> Any:
            self.scaler.show()
            loss = closure()
            self.before_update(optimizer)
            return loss

        return own, {**kwargs, "closure": checked}

    def _after_update(self, *_: object) -> None:
        if not self.scaler.show():
            for state in self._states:
                state.updated()

    def before_update(self, optimizer: Optimizer) -> None:
        """Raise `NonFiniteError` on every rank if a loss or gradient is not finite on any, or let
        the optimizer skip an update that overflows."""
        steps = list(self._steps)
        self._steps.clear()
        if not self._checked:
            due = self._interval and not self._num_updates % self._interval
            self._num_updates += 1
            checks = due or self.scaler.scaled
            self._skips = bool(checks and not self._finite(steps) and self._overflowed(steps))
            self.scaler.adapt(overflowed=self._skips)
        self._checked = True
        if self._skips:
            self.scaler.hide(optimizer)

    def _finite(self, steps: Sequence[Step]) -> bool:
        losses = [step.loss for step in steps]
        if self._norm is not None and _all_finite([self._norm, *losses]):
            return True
        return not self._run([any_bad(state, losses) for state in self._states], ())[0]

    def _overflowed(self, steps: Sequence[Step]) -> bool:
        """Whether an update is to be skipped; finite gradients whose sum is not finite are fine.
        Raises the error for what no loss scale is for."""
        bad = self._run([_bad_gradients(state) for state in self._states], ())[0]
        finite = _all_finite([step.loss for step in steps])
        if finite and (not bad or self.scaler.scaled):
            return bool(bad)
        if self._interval:
            self._raise(steps, bad)
        return True

    def _raise(self, steps: Sequence[Step], bad: Sequence[str]) -> NoReturn:
        for step in steps:
            found = self._again(step)
            if found is not None:
                raise NonFiniteError(**found)
        what = f"the gradient of `{bad[0]}`" if bad else "the loss"
        raise NonFiniteError(
            f"{what} has a NaN or an infinity, and has none when the steps run again",
            help="check what changes gradients, parameters or inputs between step and update",
        )

    def _again(self, step: Step) -> dict[str, Any] | None:
        """Run a step again, find what made its first bad value, and leave all as it was."""
        watches = Watches(step.program)
        executors = [
            Executor(step.program, executor.state, executor.constants, watches.codes)
            for executor, _ in step.ranks
        ]
        now = [executor.snapshot() for executor in executors]
        try:
            programs = []
            for executor, (_, sharders), before in zip(
                executors, step.ranks, step.before, strict=True
            ):
                executor.restore(before)
                program = begun(executor, sharders, step.inputs, training=True)
                programs.append(_watched(program, executor.state, watches))
            found: dict[str, Any] | None = self._run(programs, step.program.wire_names)[0]
            return found
        finally:
            for executor, snapshot in zip(executors, now, strict=True):
                executor.undo()
                executor.restore(snapshot)


def _all_finite(numbers: Sequence[Tensor]) -> bool:
    """Whether 0-d tensors are all finite; waits for the device once."""
    flags = [each.isfinite().to(numbers[0].device) for each in numbers]
    return not flags or bool(torch.stack(flags).all())


def any_bad(state: RankState, losses: Sequence[Tensor]) -> RankProgram:
    """Whether a loss or the sum of the gradients in a buffer is not finite on any rank.

    Multiplied by zero, what is not finite becomes a NaN, which sums over ranks keep.
    """
    numbers = [_sum(gradient) for gradient in state.flat_gradients()] + list(losses)
    total = torch.zeros((), dtype=torch.float64, device=state.device)
    for number in numbers:
        total += number.to(state.device)
    found: Tensor = yield Wire("all_reduce", state.mesh.names), total * 0
    return bool(found != 0)


def _sum(gradient: Tensor) -> Tensor:
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    return gradient.sum(dtype=torch.float32 if gradient.dtype in HALF_TYPES else None)


def _bad_gradients(state: RankState) -> RankProgram:
    """The parameters whose gradients are not finite on any rank that holds them."""
    names = [name for kind, name in state.stored if kind == "parameter"]
    held = {name: p.grad for name, p in state.parameters.items() if p.grad is not None}
    flags = [name in held and not bool(held[name].isfinite().all()) for name in names]
    own = torch.tensor(flags, dtype=torch.int32, device=state.device)
    most = (yield Wire("all_reduce", state.mesh.names, "max"), own).tolist()
    return [name for name, bad in zip(names, most, strict=True) if bad]


def _watched(program: RankProgram, state: RankState, watches: Watches) -> RankProgram:
    yield from program
    return (yield from culprit(state, watches))

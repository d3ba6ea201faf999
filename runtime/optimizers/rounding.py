"""Update parameters of 16 bits in float32, and round what comes out.

Under `precision` their gradients are float32, and so is what an optimizer keeps of them. Where the
plan makes bfloat16 the master, it is rounded stochastically: an update below 2**-9 of a weight, and
its decay, would be lost in rounding to the nearest. The bits that decide are a hash of (seed,
update, parameter, global element index): copies of a parameter and its parts under any plan are
rounded alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshwright.compiler.kernels.hashing import RandomIndex
from meshwright.compiler.kernels.rounding import round_stochastically
from meshwright.compiler.layout.extents import held_indices
from meshwright.compiler.layout.wires import HALF_TYPES
from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.dsl.statements import Precision
from meshwright.runtime.rank import RankState

_OPERATORS = 1 << 48
"""Where the numbers of parameters begin, as hashes take them: after those of random operators."""


@dataclass(frozen=True, slots=True)
class _Narrow:
    """A parameter of 16 bits on one rank, and where its entries lie in the model's tensor."""

    state: RankState
    parameter: nn.Parameter
    shape: tuple[int, ...]
    coords: tuple[Tensor, ...]
    number: int

    def round(self, wide: Tensor, out: Tensor, *, counted: bool) -> None:
        """Write `wide` to `out`, rounded stochastically; this update is `counted` or not yet."""
        seed, update = self.state.random.seed, self.state.num_updates + (not counted)
        index = RandomIndex(seed, update, self.number, self.shape, self.coords)
        round_stochastically(wide, index, out)


class Widened:
    """A context in which the parameters of 16 bits that have gradients of float32 are float32.

    For an optimizer, which is made and steps in it. Leaving it rounds what has a gradient; after an
    error all is as it was.
    """

    def __init__(self, states: Sequence[RankState], program: Program) -> None:
        statement = _statement(program)
        self._stochastic = statement is not None and statement.master == "bf16"
        self._narrow = [
            _narrow(state, program.parameters[name], parameter)
            for state in states
            for name, parameter in state.parameters.items()
            if parameter.requires_grad and update_dtype(program, parameter) != parameter.dtype
        ]
        self._before: list[tuple[_Narrow, Tensor, Tensor | None]] = []
        self._counted = True
        """Whether updates are counted before they are rounded."""

    def among(self, parameters: Container[int]) -> Widened:
        """The same of these parameters alone, given their ids, whose update is counted later."""
        found = copy(self)
        found._narrow = [each for each in self._narrow if id(each.parameter) in parameters]
        found._before, found._counted = [], False
        return found

    def __enter__(self) -> None:
        self._before = [(each, each.parameter.data, each.parameter.grad) for each in self._narrow]
        for each, data, gradient in self._before:
            _set(each.parameter, data.float(), None if gradient is None else gradient.float())

    def __exit__(self, error: object, *_: object) -> None:
        before, self._before = self._before, []
        for each, data, gradient in before:
            wide = each.parameter.data
            _set(each.parameter, data, gradient)
            if error is None and gradient is not None:
                if self._stochastic:
                    each.round(wide, data, counted=self._counted)
                else:
                    data.copy_(wide)

    def attach(self, optimizer: Optimizer) -> None:
        """Let this optimizer step, and take over a state, in this context; closures run outside."""
        if not self._narrow:
            return

        def step(own: Optimizer, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
            closures = () if closure is None else (partial(self._outside, closure),)
            with self:
                return type(own).step(own, *closures, **options)

        def load_state_dict(own: Optimizer, state_dict: Any) -> None:
            with self:
                type(own).load_state_dict(own, state_dict)

        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer.load_state_dict = MethodType(  # type: ignore[method-assign]
            load_state_dict, optimizer
        )

    def _outside(self, closure: Callable[[], Any]) -> Any:
        """The result of a closure, which steps the run and so needs its parameters as they are."""
        self.__exit__(None)
        result = closure()
        self.__enter__()
        return result


def update_dtype(program: Program, parameter: Tensor) -> torch.dtype:
    """The type in which optimizers of a run update a parameter, and keep what they do of it."""
    widened = parameter.dtype in HALF_TYPES and _statement(program) is not None
    return torch.float32 if widened else parameter.dtype


def _statement(program: Program) -> Precision | None:
    return next(iter(program.plan.of(Precision)), None)


def _narrow(state: RankState, stored: Stored, parameter: nn.Parameter) -> _Narrow:
    shape = stored.type.shape
    coords = held_indices(shape, stored.layout, stored.paddings, state.mesh, state.coords)
    number = _OPERATORS + zlib.crc32(stored.name.encode())
    return _Narrow(state, parameter, shape, tuple(coords), number)


def _set(parameter: nn.Parameter, data: Tensor, gradient: Tensor | None) -> None:
    parameter.grad = None
    parameter.data = data
    parameter.grad = gradient

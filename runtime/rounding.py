"""Update parameters of bfloat16 in float32, and round what comes out stochastically.

An update below 2**-9 of a weight, and its decay, would be lost in rounding to the nearest. The bits
that decide are a hash of (seed, update, parameter, global element index): copies of a parameter and
its parts under any plan are rounded alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshwright.compiler.kernels.hashing import RandomIndex
from meshwright.compiler.kernels.rounding import round_stochastically
from meshwright.compiler.layout.extents import held_indices
from meshwright.compiler.program import Stored
from meshwright.compiler.public import Program
from meshwright.dsl.statements import Precision
from meshwright.runtime.rank import RankState

_OPERATORS = 1 << 48
"""Where the numbers of parameters begin, as hashes take them: after those of random operators."""


@dataclass(frozen=True, slots=True)
class _Narrow:
    """A parameter of bfloat16 on one rank, and where its entries lie in the model's tensor."""

    state: RankState
    parameter: nn.Parameter
    shape: tuple[int, ...]
    coords: tuple[Tensor, ...]
    number: int

    def round(self, wide: Tensor, out: Tensor) -> None:
        seed, update = self.state.random.seed, self.state.num_updates
        index = RandomIndex(seed, update, self.number, self.shape, self.coords)
        round_stochastically(wide, index, out)


def round_updates(optimizer: Optimizer, states: Sequence[RankState], program: Program) -> None:
    """Let `step` of this optimizer update parameters of bfloat16 in float32, and round them, if the
    plan makes them masters.

    While it runs, it has float32 copies of them and of their gradients; what it keeps of them is
    float32.
    """
    if all(statement.master != "bf16" for statement in program.plan.of(Precision)):
        return
    own = {id(each) for group in optimizer.param_groups for each in group["params"]}
    narrow = [
        _narrow(state, program.parameters[name], parameter)
        for state in states
        for name, parameter in state.parameters.items()
        if id(parameter) in own and parameter.dtype == torch.bfloat16
    ]

    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with _widened(narrow):
            return type(self).step(self, *args, **kwargs)

    if narrow:
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


def _narrow(state: RankState, stored: Stored, parameter: nn.Parameter) -> _Narrow:
    shape = stored.type.shape
    coords = held_indices(shape, stored.layout, stored.paddings, state.mesh, state.coords)
    number = _OPERATORS + zlib.crc32(stored.name.encode())
    return _Narrow(state, parameter, shape, tuple(coords), number)


@contextmanager
def _widened(narrow: Sequence[_Narrow]) -> Iterator[None]:
    """Make parameters and gradients float32 inside; an update that fails changes nothing."""
    before = [(each, each.parameter.data, each.parameter.grad) for each in narrow]
    try:
        for each, data, gradient in before:
            _set(each.parameter, data.float(), None if gradient is None else gradient.float())
        yield
        for each, data, gradient in before:
            if gradient is not None:
                each.round(each.parameter.data, data)
    finally:
        for each, data, gradient in before:
            _set(each.parameter, data, gradient)


def _set(parameter: nn.Parameter, data: Tensor, gradient: Tensor | None) -> None:
    parameter.grad = None
    parameter.data = data
    parameter.grad = gradient

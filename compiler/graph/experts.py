"""The operators that a mixture of experts leaves in a captured graph, and what it reports.

`one_expert` and `all_experts` stand around a region of the graph that is written for one expert,
and runs for all of them: `passes/experts/batch.py` rewrites it. Where no expert has a capacity,
`one_row` and `all_rows` stand around one that is written for one token and an expert that it has
chosen, and runs for all choices. The others become composites of the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from meshwright.compiler.kernels import experts as kernels


@torch.library.custom_op("mesh::one_expert", mutates_args=())
def one_expert(stacked: Tensor) -> Tensor:
    """What any one expert has of a tensor whose first dim counts experts."""
    return stacked[0].clone()


@one_expert.register_fake
def _(stacked: Tensor) -> Tensor:
    return stacked.new_empty(stacked.shape[1:])


@torch.library.custom_op("mesh::all_experts", mutates_args=())
def all_experts(value: Tensor, count: int) -> Tensor:
    """What `count` experts have, stacked, of a value that is computed for any one."""
    return value.expand(count, *value.shape).clone()


@all_experts.register_fake
def _(value: Tensor, count: int) -> Tensor:
    return value.new_empty((count, *value.shape))


@torch.library.custom_op("mesh::one_row", mutates_args=())
def one_row(tokens: Tensor, expert: Tensor) -> Tensor:
    """What any one of the choices `expert[r, k]` has of `tokens[r, d]`: the features of a token."""
    return tokens[0].clone()


@one_row.register_fake
def _(tokens: Tensor, expert: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[1:])


@torch.library.custom_op("mesh::all_rows", mutates_args=())
def all_rows(value: Tensor, expert: Tensor) -> Tensor:
    """What the choices `expert[r, k]` have, `[r, k, ...]`, of what is computed for any one."""
    return value.expand(*expert.shape, *value.shape).clone()


@all_rows.register_fake
def _(value: Tensor, expert: Tensor) -> Tensor:
    return value.new_empty((*expert.shape, *value.shape))


@torch.library.custom_op("mesh::top", mutates_args=())
def top(scores: Tensor, count: int) -> Tensor:
    """The places of the largest entries of the last dim, largest first; see `kernels.top`."""
    return kernels.top(scores, count)


@top.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], count), dtype=torch.int64)


@torch.library.custom_op("mesh::positions", mutates_args=())
def positions(expert: Tensor) -> Tensor:
    """How many equal entries precede each, in the last dim; see `kernels.positions`."""
    return kernels.positions(expert)


@positions.register_fake
def _(expert: Tensor) -> Tensor:
    return torch.empty_like(expert)


@torch.library.custom_op("mesh::dispatch", mutates_args=())
def dispatch(x: Tensor, slot: Tensor, num_slots: int) -> Tensor:
    """Tokens in the slots of experts; see `kernels.dispatch`."""
    return kernels.dispatch(x, slot, None, num_slots)


@dispatch.register_fake
def _(x: Tensor, slot: Tensor, num_slots: int) -> Tensor:
    return x.new_empty((x.shape[0], num_slots, x.shape[2]))


@torch.library.custom_op("mesh::combine", mutates_args=())
def combine(y: Tensor, slot: Tensor, weight: Tensor) -> Tensor:
    """The weighted sum of what is in the slots of each token; see `kernels.combine`."""
    return kernels.combine(y, slot, weight)


@combine.register_fake
def _(y: Tensor, slot: Tensor, weight: Tensor) -> Tensor:
    return y.new_empty((*slot.shape[:2], y.shape[2]))


def _only_captured(ctx: object, grad: Tensor) -> NoReturn:
    raise RuntimeError("a mixture of experts runs as a part of a compiled program")


for _operator in (one_expert, all_experts, one_row, all_rows, dispatch, combine):
    _operator.register_autograd(_only_captured)

library = torch.ops.mesh
ONE_EXPERT: torch._ops.OpOverload = library.one_expert.default
ALL_EXPERTS: torch._ops.OpOverload = library.all_experts.default
ONE_ROW: torch._ops.OpOverload = library.one_row.default
ALL_ROWS: torch._ops.OpOverload = library.all_rows.default
TOP: torch._ops.OpOverload = library.top.default
POSITIONS: torch._ops.OpOverload = library.positions.default
DISPATCH: torch._ops.OpOverload = library.dispatch.default
COMBINE: torch._ops.OpOverload = library.combine.default


@dataclass(frozen=True)
class Reported:
    """What the mixtures of a model tell while its forward runs: `losses` to be added to the
    model's, `metrics` by the mixture's name, and by that too the `biases` of routers as they were
    before, and the `loads` of experts in all calls so far."""

    losses: list[Tensor] = field(default_factory=list)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[str, Tensor] = field(default_factory=dict)


_REPORTED: ContextVar[Reported | None] = ContextVar("reported", default=None)


@contextmanager
def reports() -> Iterator[Reported]:
    """While this is open, mixtures add to what it gives."""
    found = Reported()
    token = _REPORTED.set(found)
    try:
        yield found
    finally:
        _REPORTED.reset(token)


def report(name: str, loss: Tensor | None, metrics: Tensor) -> None:
    """Add a loss, and the metrics of one call of the mixture `name`."""
    found = _REPORTED.get()
    if found is None:
        return
    if loss is not None:
        found.losses.append(loss)
    call, key = 0, name
    while key in found.metrics:
        call += 1
        key = f"{name}.{call}"
    found.metrics[key] = metrics


def balance(name: str, bias: Tensor, load: Tensor, rate: float) -> None:
    """Let the `bias[e]` of the mixture `name` follow the `load[e]` of all its calls so far: `rate`
    is added where that is below the mean, and taken away where it is above; DeepSeek-V3
    (2412.19437)."""
    found = _REPORTED.get()
    if found is None:
        return
    total = found.loads[name] = load + found.loads[name] if name in found.loads else load
    missing = (total.sum() - total * len(total)).sign()
    bias.copy_(found.biases[name] + rate * missing.to(bias.dtype))


def bias_before(name: str, bias: Tensor | None) -> Tensor | None:
    """The bias of the mixture `name` as it was before the forward, in every call of it."""
    found = _REPORTED.get()
    if found is None or bias is None:
        return bias
    if name not in found.biases:
        found.biases[name] = bias.clone()
    return found.biases[name]

"""A mixture of experts in the place of a module: its router, and the module for every expert."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from meshwright.compiler.graph import experts as ops
from meshwright.dsl.errors import PlanError
from meshwright.dsl.statements import Experts
from meshwright.passes.experts.routes import (
    ROUTES,
    Routed,
    Routing,
    auxiliary_loss,
    counts,
    metrics,
)


@dataclass(frozen=True)
class Settings:
    """What a plan says of a mixture: its `routing`, the `groups` of tokens of a batch (None: its
    rows), the `weight` of the auxiliary loss, the `noise` of what the router sees in training,
    which is multiplied by numbers from 1 - noise to 1 + noise, and the `rate` at which a bias
    balances the experts, if one does."""

    routing: Routing
    groups: int | None = None
    weight: float = 0.0
    noise: float = 0.0
    rate: float = 0.0
    fresh: bool = False
    """Whether experts are initialised as the module would be, or as noisy copies of it."""
    seed: int = 0
    statement: Experts | None = None
    """The one that says so."""

    def error(self, message: str, *, place: str = "", help: str) -> PlanError:
        """An error at the statement, or at a `place` in it."""
        span = None if self.statement is None else self.statement.at(place)
        return PlanError("P501", message, spans=[span], help=help)


class Router(nn.Module):
    """Logits `[..., e]` of tokens `[..., d]`, at least in single precision; and, where it is
    `balanced` so, the `bias[e]` that balances the experts, which has no gradient."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, *, balanced: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if balanced else None
        self.register_buffer("bias", bias)

    def reset_parameters(self) -> None:
        """Small logits, so that tokens start evenly spread; Switch (2101.03961)."""
        nn.init.normal_(self.weight, std=math.sqrt(0.1 / self.weight.shape[1]))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        # A cast that changes nothing returns its operand, and would stand for the tokens that are
        # dispatched too: hence the view.
        logits: Tensor = F.linear(x.view_as(x).to(dtype), self.weight.to(dtype))
        return logits


class Mixture(nn.Module):
    """Runs `region`, a module that treats each token alone, as one expert of many.

    `experts` is the module with its parameters stacked, `[e, ...]`, and `name` the module's. What
    the router sees are `width` features. It runs while a model is captured: `mesh::one_expert` and
    `mesh::all_experts` stand around what is to be done for every expert.
    """

    def __init__(self, name: str, region: nn.Module, width: int, settings: Settings) -> None:
        super().__init__()
        self.name, self.settings = name, settings
        count = settings.routing.count
        like = next(region.parameters())
        self.router = Router(like.new_empty((count, width)), balanced=settings.rate > 0)
        self.experts = region
        self.training = region.training
        self.router.train(region.training)
        if not like.is_meta:
            self._check_fresh()
            with _seeded(like.device, settings.seed, name):
                self.router.reset_parameters()
                _stack(region, count, fresh=settings.fresh)
        else:
            for module, own in _own_parameters(region):
                module._parameters |= {
                    key: _like(p, p.new_empty((count, *p.shape))) for key, p in own.items()
                }
        for module, _ in _own_parameters(region):
            if callable(getattr(module, "reset_parameters", None)):
                module.__dict__["reset_parameters"] = partial(_reset_each, module, count)

    def _check_fresh(self) -> None:
        """Raises `PlanError` where experts cannot begin anew as the plan says."""
        for module, _ in _own_parameters(self.experts) if self.settings.fresh else ():
            if not callable(getattr(module, "reset_parameters", None)):
                raise self.settings.error(
                    f"`{type(module).__name__}` in `{self.name}` has no `reset_parameters` by "
                    "which experts could begin anew",
                    place="init",
                    help="write `init=copy`, or give the class that method",
                )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise self.settings.error(
                f"`{self.name}` takes more than one tensor of tokens, as an expert cannot",
                help="name a module that maps tokens to tokens",
            )
        routing = self.settings.routing
        if not self.training:
            routing = replace(routing, random_second=False)
        tokens = self._grouped(x)
        logits = self.router(self._noisy(tokens))
        bias = ops.bias_before(self.name, self.router.bias)
        routed = ROUTES[routing.route](logits, routing, bias)
        kept = routed.position >= 0
        if routing.factor is None:
            found = self._dropless(tokens, routed, x.dim())
        else:
            capacity = routing.capacity(tokens.shape[1])
            # Out of place: making a graph functional takes a second trace, and drops the
            # router's cast where the model is in float32.
            kept = kept & (routed.position < capacity)
            found = self._in_slots(tokens, routed, kept, capacity, x.dim())
        ops.report(self.name, self._loss(routed), metrics(routed, kept))
        if self.router.bias is not None and self.training:
            load = counts(routed.expert, routing.count).sum(0)
            ops.balance(self.name, self.router.bias, load, self.settings.rate)
        return found.view(*x.shape[:-1], -1)

    def _in_slots(
        self, tokens: Tensor, routed: Routed, kept: Tensor, capacity: int, dims: int
    ) -> Tensor:
        """What experts of a capacity give for `tokens[g, s, d]`, of what is kept."""
        groups, _, width = tokens.shape
        count = self.settings.routing.count
        slot = torch.where(kept, routed.expert * capacity + routed.position, -1)
        rows = ops.dispatch(tokens, slot, count * capacity)
        rows = rows.view(groups, count, capacity, width).transpose(0, 1)
        rows = self._experts(rows, dims)
        rows = rows.transpose(0, 1).reshape(groups, count * capacity, -1)
        found: Tensor = ops.combine(rows, slot, routed.weight)
        return found

    def _dropless(self, tokens: Tensor, routed: Routed, dims: int) -> Tensor:
        """What experts give for all choices of `tokens[g, s, d]`. The module is given one token,
        with as many dims as there were."""
        width, choices = tokens.shape[-1], routed.expert.shape[-1]
        expert = routed.expert.reshape(-1, choices)
        own = ops.one_row(tokens.reshape(-1, width), expert)
        found = self._region(own.view(*(1,) * (dims - 1), width))
        rows: Tensor = ops.all_rows(found.reshape(-1), expert)
        weight = routed.weight.reshape(-1, choices, 1).to(rows.dtype)
        return (rows * weight).sum(1)

    def _loss(self, routed: Any) -> Tensor | None:
        if not self.training or not self.settings.weight:
            return None
        loss = auxiliary_loss(routed)
        return None if loss is None else loss * self.settings.weight

    def _grouped(self, x: Tensor) -> Tensor:
        """Tokens `[g, s, d]`."""
        groups = self.settings.groups
        if groups is None:
            if x.dim() < 3:
                raise self.settings.error(
                    f"`{self.name}` takes {list(x.shape)}, whose rows are not groups of tokens",
                    help="write how many groups a batch has: `groups=8`",
                )
            groups = x.shape[0]
        total = x.shape[:-1].numel()
        if total % groups:
            raise self.settings.error(
                f"{total} tokens of `{self.name}` cannot be cut into {groups} groups",
                place="groups",
                help="write a number of `groups` that divides the tokens of a batch",
            )
        return x.reshape(groups, total // groups, x.shape[-1])

    def _noisy(self, tokens: Tensor) -> Tensor:
        noise = self.settings.noise
        if not noise or not self.training:
            return tokens
        return tokens * (1 - noise + 2 * noise * torch.rand_like(tokens))

    def _experts(self, rows: Tensor, dims: int) -> Tensor:
        """`rows[e, g, c, d]` through the expert of each, which is given as many dims as the module
        was."""
        count, groups, capacity, width = rows.shape
        own = ops.one_expert(rows)
        inner = (groups * capacity,) if dims == 2 else (groups, *(1,) * (dims - 3), capacity)
        found = self._region(own.reshape(*inner, width))
        stacked: Tensor = ops.all_experts(found.reshape(groups, capacity, -1), count)
        return stacked

    def _region(self, own: Tensor) -> Tensor:
        """What the module gives for tokens `[..., d]` with the parameters of one expert."""
        parameters = {name: ops.one_expert(p) for name, p in self.experts.named_parameters()}
        found = functional_call(self.experts, parameters, (own,))
        if not isinstance(found, Tensor) or found.shape[:-1] != own.shape[:-1]:
            raise self.settings.error(
                f"`{self.name}` does not give one row for each token",
                help="name a module that maps tokens to tokens",
            )
        return found


def _own_parameters(region: nn.Module) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Every module of a region that has parameters of its own, and these."""
    for module in region.modules():
        own = {key: p for key, p in module._parameters.items() if p is not None}
        if own:
            yield module, own


@contextmanager
def _seeded(device: torch.device, seed: int, name: str) -> Iterator[None]:
    """Draw random numbers of a seed and a name; afterwards others go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        yield


_NOISE = 0.01
"""The noise of copied weights, as a share of a tensor's own deviation."""


def _stack(region: nn.Module, count: int, *, fresh: bool) -> None:
    """Stack the parameters of every expert."""
    for module, own in _own_parameters(region):
        stacked = {k: p.detach().expand(count, *p.shape).clone() for k, p in own.items()}
        module._parameters |= {key: _like(own[key], each) for key, each in stacked.items()}
        if fresh:
            _reset_each(module, count)
            continue
        for each in stacked.values():
            if each[0].numel() == 1:
                continue
            deviation = each[0].std() * _NOISE
            for expert in each:  # by turns, since the noise of all would be as large as they are
                expert += torch.randn_like(expert) * deviation


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _reset_each(module: nn.Module, count: int) -> None:
    """Initialise the parameters of a module for every expert in turn, as its class does."""
    stacked, kind = dict(module._parameters), type(module)
    reset: Callable[[nn.Module], None] = kind.reset_parameters  # type: ignore[attr-defined]
    try:
        for expert in range(count):
            for key, each in stacked.items():
                # A view: what is written to it is written to the stack.
                view = None if each is None else each.detach()[expert]
                module._parameters[key] = cast("nn.Parameter | None", view)
            reset(module)
    finally:
        module._parameters.update(stacked)

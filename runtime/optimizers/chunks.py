"""Update what is kept away from the device on the CPU, chunk by chunk.

An optimizer of torch makes its own step on one chunk after the other, each with its parameters
alone, so that no more than two chunks need memory besides where they are kept: while one is
updated, the next is read ahead from its files, and the one before is written back, or on its way to
the device. Groups are as they were before the step for each chunk, so what an optimizer counts in
them it counts once; and hooks run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshwright.compiler.program import Place
from meshwright.runtime.optimizers.rounding import Widened
from meshwright.runtime.rank import RankState

CHUNK_BYTES = 32 << 20
"""The bytes of parameters at which a chunk is full."""


@dataclass(frozen=True, slots=True)
class Away:
    """A parameter that is updated away from its rank's device."""

    state: RankState
    name: str
    place: Place

    @property
    def parameter(self) -> nn.Parameter:
        return self.state.parameters[self.name]


def attach_updates(
    optimizer: Optimizer,
    states: Sequence[RankState],
    widened: Widened,
    kind: Callable[[Optimizer, Sequence[Away], Widened], Chunks] | None = None,
) -> None:
    """Let an optimizer step parameters of 16 bits as they are `widened`, and in `Chunks`, or those
    of another kind, what is kept away from the device, if anything is."""
    widened.attach(optimizer)
    away = [
        Away(state, name, place)
        for state in states
        for name in state.parameters
        if (place := state.stored["parameter", name].kept.update).away
    ]
    if away:
        (kind or Chunks)(optimizer, away, widened).attach()


class Chunks:
    """The steps of an optimizer, in each of which one chunk after the other is updated."""

    def __init__(self, optimizer: Optimizer, away: Sequence[Away], widened: Widened) -> None:
        self.optimizer, self.widened = optimizer, widened
        self.away = {id(each.parameter): each for each in away}
        for each in away:
            self._adopt(each)

    def attach(self) -> None:
        """Have the optimizer's `step` be this one, with the hooks of any."""
        raw: Callable[..., Any] = type(self.optimizer).step.__wrapped__  # type: ignore[attr-defined]

        def step(own: Optimizer, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
            if closure is None:
                return self._run(lambda: raw(own, **options))
            with torch.enable_grad():
                loss = closure()
            self._run(lambda: raw(own, lambda: loss, **options))
            return loss

        hooked = Optimizer.profile_hook_step(step)
        self.optimizer.step = MethodType(hooked, self.optimizer)  # type: ignore[method-assign]

    def _run(self, step: Callable[[], Any]) -> None:
        """Make a step of each chunk in turn."""
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        here, *chunks = self._chunks()
        for each in chunks[:1]:
            self._ahead(each)
        try:
            # With all groups: what is counted in one is counted without its parameters too.
            self._of(here, before, groups, step, every=True)
            for i, chunk in enumerate(chunks):
                for each in chunks[i + 1 : i + 2]:
                    self._ahead(each)
                self._update(chunk, before, groups, step)
        except BaseException as error:
            error.add_note("some parameters are updated and some are not: load a checkpoint")
            raise
        finally:
            self.optimizer.param_groups = groups

    def _chunks(self) -> Iterator[list[nn.Parameter]]:
        """The parameters that are updated on the device, then those elsewhere which have gradients:
        what fills a chunk, rank by rank and in the order of the model."""
        given = [p for group in self.optimizer.param_groups for p in group["params"]]
        yield [p for p in given if id(p) not in self.away]
        listed, size = {id(p) for p in given if p.grad is not None}, 0
        chunk: list[nn.Parameter] = []
        for each in self.away.values():
            if id(each.parameter) in listed:
                chunk.append(each.parameter)
                size += each.parameter.nbytes
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _update(
        self,
        chunk: Sequence[nn.Parameter],
        before: Sequence[dict[str, Any]],
        groups: Sequence[dict[str, Any]],
        step: Callable[[], Any],
    ) -> None:
        """Update what is away, and keep it where it is kept."""
        members = [self.away[id(parameter)] for parameter in chunk]
        for each in members:
            for place, tensor in self._tensors(each):
                each.state.stores(place.path).wait(tensor)
        try:
            self._of(chunk, before, groups, step)
        finally:
            for each in members:
                self._adopt(each)
                each.state.follow(each.name)
                for place, tensor in self._tensors(each):
                    each.state.stores(place.path).settle(tensor)

    def _of(
        self,
        chunk: Sequence[nn.Parameter],
        before: Sequence[dict[str, Any]],
        groups: Sequence[dict[str, Any]],
        step: Callable[[], Any],
        *,
        every: bool = False,
    ) -> None:
        """Step these parameters alone, in their groups or in `every` one."""
        own = {id(parameter) for parameter in chunk}
        parts = [
            {**group, "params": [p for p in group["params"] if id(p) in own]} for group in before
        ]
        stepped = [each for each in zip(groups, parts, strict=True) if each[1]["params"] or every]
        self.optimizer.param_groups = [part for _, part in stepped]
        with self.widened.among(own):
            step()
        for group, part in stepped:
            group.update({key: value for key, value in part.items() if key != "params"})

    def _ahead(self, chunk: Iterable[nn.Parameter]) -> None:
        """Begin to read what a chunk is updated from."""
        for parameter in chunk:
            each = self.away[id(parameter)]
            for place, tensor in self._tensors(each):
                each.state.stores(place.path).ahead(tensor)

    def _tensors(self, away: Away) -> Iterator[tuple[Place, Tensor]]:
        """What an update reads and writes, and where it is kept."""
        kept = away.state.stored["parameter", away.name].kept
        yield kept.value if kept.value.away else kept.update, away.parameter.data
        if away.parameter.grad is not None:
            yield away.place, away.parameter.grad
        for value in self.optimizer.state.get(away.parameter, {}).values():
            if is_large(value):
                yield away.place, value

    def _adopt(self, away: Away) -> None:
        """Keep what the optimizer has made where it is to be."""
        kept = self.optimizer.state.get(away.parameter, {})
        store = away.state.stores(away.place.path)
        for key, value in kept.items():
            if is_large(value) and not store.has(value):
                kept[key] = store.hold(value.shape, value.dtype).copy_(value)


def is_large(value: Any) -> bool:
    """Whether what an optimizer keeps is a tensor of more than one number, and not a count."""
    return isinstance(value, Tensor) and bool(value.dim()) and value.numel() > 1

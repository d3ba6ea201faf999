"""What an optimizer keeps on one rank, and needs to update it, without the memory for either.

The optimizer is made and steps as in a run, on fake tensors of the rank's shapes and types, with
the norm of the gradients and the look for what is not finite before. Single numbers are real, and
one: an optimizer may ask for theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.compiler.graph.types import Fakes
from meshwright.compiler.program import Update
from meshwright.compiler.public import Program
from meshwright.compiler.report.memory.counter import StorageCounter, address
from meshwright.compiler.report.memory.scratch import KernelCounter
from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.checks.finite import any_bad
from meshwright.runtime.optimizers.chunks import attach_updates, is_large
from meshwright.runtime.optimizers.elementwise import update
from meshwright.runtime.optimizers.equal_chunks import EqualChunks, Took
from meshwright.runtime.optimizers.imagined import Imagined
from meshwright.runtime.optimizers.norms import clipped
from meshwright.runtime.optimizers.optimizer import (
    FAILURES,
    HOW,
    Groups,
    fused_on,
    make_optimizer,
    tried,
)
from meshwright.runtime.optimizers.rounding import Widened
from meshwright.runtime.rank import RankProgram

aten = torch.ops.aten

_MOST_UPDATES = 512
"""The most updates that are made until the state does not grow any more."""
_VARIED_UPDATES = 48
"""Those with other numbers. For LBFGS, 16 are too few to meet the most that a search keeps."""


def predicted_update(
    program: Program,
    rank: int,
    kind: Callable[..., Optimizer],
    groups: Groups,
    options: Mapping[str, Any],
) -> Update:
    """What the optimizer that `Run.optimizer` makes of these keeps and needs on a rank.

    Raises what `Run.optimizer` raises.
    """
    fakes = Fakes()
    with apart_from_caller(program.imagined_on.type):
        state = Imagined(program, rank, fakes)
        with StorageCounter() as indices:
            widened = Widened([state], program)
        with widened:
            held = state.parameters.items()
            optimizer = make_optimizer(program, held, kind, groups, options)
        if program.device.type == "cuda":
            _choose_as_on_gpu(optimizer)
        widened.among({id(p) for p in state.parameters.values() if p.grad is not None}).attach(
            optimizer
        )
        update = _updated(program, state, optimizer, _UpdateCounter(fakes))
        if state.away:
            with widened:
                optimizer = make_optimizer(program, held, kind, groups, options)
            if program.device.type == "cuda":
                _choose_as_on_gpu(optimizer, lists=False)
            update = _with_those_elsewhere(update, program, state, optimizer, widened, fakes)
        return replace(update, state={**update.state, "": update.state[""] + indices.alive})


def _with_those_elsewhere(
    update: Update,
    program: Program,
    state: Imagined,
    optimizer: Optimizer,
    widened: Widened,
    fakes: Fakes,
) -> Update:
    """What an update takes, with that of the parameters which the CPU updates in chunks."""
    counter = _UpdateCounter(fakes)
    state.go_elsewhere(counter.kept_in)
    alike: dict[str, str] = {}
    with fakes:  # an optimizer may have made its state with itself
        attach_updates(optimizer, [state], widened, partial(EqualChunks, counter, alike))
    found = _updated(program, state, optimizer, counter)
    pairs = [(name, alike.get(name, name)) for name in state.away]
    kept = {name: found.state[like] for name, like in pairs if like in found.state}
    most = counter.peak_with_scratch() - counter.alive + _beside_files(state, optimizer, pairs)
    return replace(update, state={**update.state, **kept}, elsewhere=most)


def _beside_files(state: Imagined, optimizer: Optimizer, pairs: Iterable[tuple[str, str]]) -> int:
    """The bytes of single numbers, such as counts of updates, that an optimizer keeps in memory of
    what is updated in files, given each of these with a parameter whose state is as large."""
    return sum(
        value.nbytes
        for name, like in pairs
        if state.stored["parameter", name].kept.update.to == "disk"
        for value in tree_leaves(optimizer.state.get(state.parameters[like], {}))
        if isinstance(value, Tensor) and not is_large(value)
    )


def _choose_as_on_gpu(optimizer: Optimizer, *, lists: bool = True) -> None:
    """Let groups be updated as with parameters on a GPU, where torch chooses `lists` of tensors. It
    does not for fakes, which may be on the CPU besides."""
    for group in optimizer.param_groups:
        if group.get("fused") and "cuda" not in fused_on(type(optimizer)):
            group["fused"] = None
        if lists and group.get("foreach", False) is None and not any(group.get(how) for how in HOW):
            group["foreach"] = True


class _UpdateCounter(KernelCounter):  # type: ignore[no-untyped-call]
    """Counts what an update makes of fake tensors, by operator."""

    def __init__(self, fakes: Fakes) -> None:
        super().__init__()
        self._fakes = fakes
        self._made_by: dict[int, str] = {}
        self._at_peak: dict[Any, tuple[str, int]] = {}
        """By storage: what is alive at the peak, the operator that made it, and its bytes."""
        self.beside_steps = 0
        """The most bytes alive where an update has called the closure."""
        self.called = self.asked = False
        """Whether an update has called the closure, and looked at a number."""
        self._random: Random | None = None
        self._in_file = False

    @contextmanager
    def kept_in(self, file: bool) -> Iterator[None]:
        """Leave out what is made meanwhile, if it stands for a part of a file."""
        self._in_file = file
        yield
        self._in_file = False

    @contextmanager
    def part(self) -> Iterator[Took]:
        """Count what is done meanwhile as ever, and what it takes by itself."""
        before, peak, calls, at_peak = self.alive, self.peak, self._calls, self._at_peak
        self.peak, self._calls, took = before, {}, Took()
        yield took
        took.kept, took.peak = self.alive - before, self.peak - before
        took.calls = {call: alive - before for call, alive in self._calls.items()}
        if self.peak <= peak:
            self._at_peak = at_peak
        self.peak, self._calls = peak, calls
        self._reach(before, took)

    def again(self, took: Took) -> None:
        """Count what took as much as an earlier part."""
        self._reach(self.alive, took)
        self.alive += took.kept

    def _reach(self, before: int, took: Took) -> None:
        self.peak = max(self.peak, before + took.peak)
        for call, alive in took.calls.items():
            self._calls[call] = max(before + alive, self._calls.get(call, 0))

    def vary(self) -> None:
        """Let numbers have either sign from here on."""
        self._random = Random(0)

    def _number(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((), self._random.choice((1, -1)) if self._random else 1, dtype=dtype)

    def run(self, function: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if any(isinstance(each, Tensor) for each in tree_leaves((args, kwargs))):
            self.asked |= function is aten._local_scalar_dense.default
            return tree_map(self._real, function(*args, **kwargs))
        with self._fakes:
            found = function(*args, **kwargs)
        large = any(isinstance(each, Tensor) and each.numel() > 1 for each in tree_leaves(found))
        return found if large else function(*args, **kwargs)

    def made_by(self, function: Any, tensor: Tensor) -> None:
        if self._in_file:
            return
        super().made_by(function, tensor)
        self._made_by[address(tensor)] = function._schema.name
        if self.alive > self.peak:
            made = self.made.items()
            self._at_peak = {storage: (self._made_by[key], n) for key, (storage, n) in made}

    def closure(self) -> Tensor:
        """A closure that leaves the gradients as they are."""
        self.called = True
        self.beside_steps = max(self.beside_steps, self.alive)
        return self._number()

    def _real(self, value: Any) -> Any:
        is_number = isinstance(value, FakeTensor) and not value.dim()
        return self._number(value.dtype) if is_number else value

    def temporaries(self, num_bytes: int) -> dict[str, int]:
        """What was alive at the peak and is not now, by operator, but for what has taken its place,
        and what is left of `num_bytes` as the memory of kernels."""
        found, later = Counter[str](), Counter[str]()
        for storage, (name, size) in self._at_peak.items():
            if storage() is None:
                found[name] += size
        for key, (storage, size) in self.made.items():
            if storage not in self._at_peak:
                later[self._made_by[key]] += size
        found -= later
        left = num_bytes - found.total()
        return {**found, "kernels": left} if left >= 0 else {"operators": num_bytes}


def _updated(
    program: Program, state: Imagined, optimizer: Optimizer, counter: _UpdateCounter
) -> Update:
    """Update until the state does not grow any more; then, where updates call the closure and look
    at numbers, with others: what a line search keeps depends on them."""
    names = {parameter: name for name, parameter in state.parameters.items()}
    before, losses = -1, [torch.ones(())]
    step = partial(update, optimizer, counter.closure)
    for _ in range(_MOST_UPDATES):
        with counter:
            norm = _driven(clipped(state, program, 1.0, 2.0))  # kept until the next one
            _driven(any_bad(state, losses))
            tried(type(optimizer), "tensors without memory", step)
        state.num_updates += 1
        if counter.alive == before:
            break
        before = counter.alive
    assert norm is not None
    if counter.asked and counter.called:
        counter.vary()
        with counter, suppress(*FAILURES):
            for _ in range(_VARIED_UPDATES):
                step()
    peak = counter.peak_with_scratch() if state.device.type == "cpu" else counter.peak
    return Update(
        type(optimizer).__name__,
        _state(optimizer, names, counter),
        counter.temporaries(peak - counter.alive),
        max(counter.beside_steps - counter.alive, 0),
    )


def _state(
    optimizer: Optimizer, names: Mapping[Any, str], counter: KernelCounter
) -> dict[str, int]:
    """The bytes of an optimizer's state, by parameter, and of what else its updates have left."""
    seen = {address(parameter) for parameter in names}
    found: dict[str, int] = {}
    for parameter, own in optimizer.state.items():
        tensors = [each for each in tree_leaves(own) if isinstance(each, Tensor)]
        new = {address(each): each.untyped_storage().nbytes() for each in tensors}
        name = names.get(parameter, "")
        found[name] = found.get(name, 0) + sum(new[key] for key in new.keys() - seen)
        seen |= new.keys()
    left = sum(size for key, (_, size) in counter.made.items() if key not in seen)
    return {**found, "": found.get("", 0) + left}


def _driven(program: RankProgram) -> Any:
    """Drive a rank to its end, as if all others gave what it gives. Returns what it returns."""
    answer: Any = None
    try:
        while True:
            _, answer, *_ = program.send(answer)
    except StopIteration as stop:
        return stop.value

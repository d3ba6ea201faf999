"""One rank of a program alone in this process, and every byte that it allocates while it trains.

What torch's allocator gives out is counted, whoever asks for it: operators, what their kernels need
inside, the optimizer. What it gives out while the CPU updates what is kept elsewhere is memory of
the host, as are the blocks of stores. The other members of a group are taken to give what this rank
gives.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import record_function

import meshwright
from meshwright.compiler.kernels import hashing
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Start, Wait, Wire
from meshwright.compiler.report.memory.counter import address
from meshwright.compiler.report.memory.scratch import allocations
from meshwright.runtime import run as runs
from meshwright.runtime.offloading.slabs import Block, Slabs
from meshwright.runtime.optimizers.chunks import Chunks
from meshwright.runtime.rank import RankProgram

BEGIN = "a step begins"
PLACES = ("device", "host")


class Alone:
    """A transport with one rank, in whose place the others answer at once."""

    has_every_rank = False

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self.mesh, self.ranks = mesh, (rank,)

    def run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        """Drive the rank to its end."""
        (program,) = programs
        answer: Any = None
        try:
            while True:
                request, answer = program.send(answer), None
                if isinstance(request, Wait):
                    answer, request.handle[:] = request.handle[0], []
                elif isinstance(request, Start):
                    lent = (request.wire, request.tensor, request.donate)
                    answer = [self.answer(*lent), lent]  # which is kept until the wait
                    del lent
                else:
                    answer = self.answer(*request)
                del request
        except StopIteration as stop:
            return [stop.value]

    def answer(self, wire: Wire, tensor: Tensor, donate: bool = False) -> Tensor:
        """The result of a collective, in memory of its own where a process has it there."""
        if wire.ends is not None:
            place = self.mesh.group(self.ranks[0], wire.axes).index(self.ranks[0])
            return tensor.zero_() if place == wire.ends[1] else tensor
        size = self.mesh.size(wire.axes)
        match wire.kind:
            case "all_gather":
                return tensor.expand(size, *tensor.shape).clone()
            case "reduce_scatter":
                return tensor[0].clone()
            case "all_reduce" if donate:
                return tensor
        return tensor.clone()

    def connect(self, wires: Iterable[Wire]) -> None:
        """There is nobody to connect to."""

    def check_same_program(self, digest: str) -> None:
        """There is nobody to compare with."""

    def close(self, error: BaseException | None = None) -> None:
        """There is nothing to leave."""


@contextmanager
def alone(rank: int) -> Iterator[None]:
    """Launch programs with one rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "transport_of", lambda mesh, device: Alone(mesh, rank))
        yield


Train = Callable[[Any, Callable[[], Any]], None]
"""Makes an optimizer of a run, given it and what makes a step, and trains for a few updates."""


def measured(program: meshwright.Program, example: Any, rank: int, train: Train) -> int:
    """The most bytes that a rank holds from its first step on, with the batch and constants."""
    return measured_by_place(program, example, rank, train)["device"]


def measured_by_place(
    program: meshwright.Program, example: Any, rank: int, train: Train
) -> dict[str, int]:
    """The same, with those in host memory and in files."""
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    hashing._cached_tables.cache_clear()
    gc.collect()  # what goes meanwhile would count
    with alone(rank), _marked(), allocations() as log:
        run = program.launch(check_inputs=False)

        def step() -> Any:
            _mark(BEGIN)
            return run.step(*args, **kwargs)

        train(run, step)
        executor, sharders = run._programs.launched.ranks[0]
        inputs = run._programs.launched.inputs.flatten(args, kwargs, "")
        batch = sum(sharders[i](inputs[i]).nbytes for i in executor.taken)
        constants = {address(c): c.untyped_storage().nbytes() for c in executor.constants.values()}
        # Blocks of files are given back by the threads that write them, which the log leaves out.
        stores = executor.state.stores.by_path.items()
        in_files = sum(store.slabs.peak for path, store in stores if path is not None)
    peak = _peaks(log)
    peak["device"] += batch + sum(constants.values())
    return {**peak, "disk": in_files}


def _peaks(log: Iterable[tuple[str, int]]) -> dict[str, int]:
    """By place: the most bytes there from the first step on."""
    held, peak = dict.fromkeys(PLACES, 0), dict.fromkeys(PLACES, 0)
    begun, place = False, "device"
    for name, size in log:
        begun |= name == BEGIN
        word, _, number = name.partition(" ")
        if word in PLACES and not number:
            place = word
        elif word in PLACES:
            held[word] += int(number)
        held[place] += size
        peak = {each: max(held[each], peak[each]) if begun else 0 for each in PLACES}
    return peak


def _mark(name: str) -> None:
    with record_function(name):
        pass


@contextmanager
def _marked() -> Iterator[None]:
    """Note in the log whose memory is given out, and what stores take and give back."""
    update, take, free = Chunks._update, Slabs.take, Block.__del__

    def updated(*args: Any) -> None:
        _mark("host")
        update(*args)
        _mark("device")

    def taken(slabs: Slabs[Any], size: int) -> Block[Any]:
        block = take(slabs, size)
        if isinstance(block.slab, Tensor):
            _mark(f"host {size}")
        return block

    def freed(block: Block[Any]) -> None:
        if isinstance(block.slab, Tensor):
            _mark(f"host {-block.size}")
        free(block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chunks, "_update", updated)
        patch.setattr(Slabs, "take", taken)
        patch.setattr(Block, "__del__", freed)
        yield


def train_with(kind: Any, *, clip: float | None = 1.0, updates: int = 2, **options: Any) -> Train:
    """Updates of an optimizer of this class."""

    def train(run: Any, step: Callable[[], Any]) -> None:
        optimizer = run.optimizer(kind, **options)
        for _ in range(updates):
            step()
            if clip is not None:
                run.clip_grad_norm_(clip)
            optimizer.step()
            optimizer.zero_grad()

    return train


ADAMW = train_with(torch.optim.AdamW)

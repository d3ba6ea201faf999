"""What the graphs of each stage cost on this machine: a few steps of one rank per stage, alone.

What other ranks would send is made up, of the right type, so that no more memory is taken than one
rank needs; and what is waited for is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import WIRES, Start, Wait, Wire
from meshwright.compiler.public import Program
from meshwright.compiler.schedules.actions import Action
from meshwright.compiler.schedules.simulate import Costs
from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.errors import RunError
from meshwright.runtime.executor import Executor
from meshwright.runtime.inputs import Inputs
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.state.weights import values_of
from meshwright.runtime.stepping import begun
from meshwright.runtime.transports.meshes import check_device

_SECONDS = 0.5
"""How long the steps of one rank are repeated."""
_MOST = 10
"""The most steps of one rank."""


def measured(program: Program) -> Costs | None:
    """The seconds that a rank of each stage computes for one microbatch, without communication;
    None where there is no device like the program's."""
    try:
        check_device(program.device)
    except RunError:
        return None
    times: dict[tuple[Phase, int], list[float]] = {}
    with apart_from_caller(program.device.type):
        for coordinate in program.table.coordinates:
            for action, seconds in _of_rank(program, coordinate):
                times.setdefault((action.kind, action.stage), []).append(seconds)
    stages = range(len(program.stages))
    return Costs.of_phases(
        {
            phase: [statistics.median(times.get((phase, stage), [0])) for stage in stages]
            for phase in Phase
        }
    )


def _of_rank(program: Program, coordinate: int) -> list[tuple[Action, float]]:
    """What the first rank at a coordinate along the pipeline took for each of its actions."""
    mesh = program.mesh
    rank = mesh.group(0, program.pipeline)[coordinate]
    state = RankState(program, rank, values_of(program, None))
    constants = {n: t.to(state.device) for n, t in program.captured.constants.items()}
    timed, inputs = _Timed(program, state, constants), Inputs(program)
    sharders = inputs.sharders(state.coords, state.device)
    made_up = [_made_up(torch.empty(shape, dtype=dtype)) for shape, dtype in inputs.expected]
    steps, begin = 0, time.perf_counter()
    # The first step is slower than others.
    while steps < 2 or (steps < _MOST and time.perf_counter() - begin < _SECONDS):
        if steps == 1:
            timed.times.clear()
        with torch.no_grad():
            _alone(begun(timed, sharders, made_up, training=program.trains), program, coordinate)
        timed.undo()
        steps += 1
    return timed.times


def _made_up(memory: Tensor) -> Tensor:
    """`memory` filled with ones or, as indices may have to be below anything, with zeros."""
    index = not (memory.is_floating_point() or memory.is_complex() or memory.dtype == torch.bool)
    return memory.fill_(0 if index else 1)


class _Timed(Executor):
    """An executor that notes how long each action computes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.times: list[tuple[Action, float]] = []

    def act(self, action: Action, step: Any) -> RankProgram:
        seconds, answer = 0.0, None
        running: Generator[Any, Any, Any] = super().act(action, step)
        while True:
            begin = self._now()
            try:
                asked = running.send(answer)
            except StopIteration as end:
                self.times.append((action, seconds + self._now() - begin))
                return end.value
            seconds += self._now() - begin
            answer = yield asked

    def _now(self) -> float:
        if self.state.device.type == "cuda":
            torch.cuda.synchronize(self.state.device)
        return time.perf_counter()


def _alone(rank: RankProgram, program: Program, coordinate: int) -> None:
    """Drive the rank at a coordinate to its end, as if the others of a group gave what it gives."""
    answer: Any = None
    try:
        while True:
            request = rank.send(answer)
            if isinstance(request, Wait):
                answer = request.handle
            elif isinstance(request, Start):
                answer = _answer(request.wire, request.tensor, program.mesh, coordinate)
            else:
                wire, tensor, *_ = request
                answer = _answer(wire, tensor, program.mesh, coordinate)
    except StopIteration:
        return


def _answer(wire: Wire, tensor: Tensor, mesh: Mesh, coordinate: int) -> Tensor:
    """What a rank gets from ranks that give what it gives, or send something."""
    if wire.ends is not None:
        return _made_up(tensor) if coordinate == wire.ends[1] else tensor
    kind, size = WIRES[wire.kind], mesh.size(wire.axes)
    return kind.receive(wire, 0, [kind.given(tensor, 0)] * size, None)

"""Programs whose parameters are held at some coordinates of an axis `pp` alone, and run no steps:
gradients are those of a run of the same plan whose ranks all hold all."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

import meshwright as mw
from meshwright.compiler.graph.ir import Graph, Phase
from tests.runtime.models import PLANS, batch, make

Places = Mapping[str, tuple[int, ...]]
"""Coordinates along `pp` by the beginning of a name; what begins like none is held by all."""
HALVES: Places = {"wte": (0,), "wpe": (0,), "blocks.0": (0,), "blocks.1": (1,), "s": (1,)}
TWICE: Places = {"wte": (0, 3), "blocks.0": (1, 2), "blocks.1": (1, 2), "wpe": (2,), "steps": (3,)}


@functools.cache
def whole(plan: str) -> mw.Program:
    """Every rank holds all, and the ranks along `pp` do the same."""
    plan = PLANS.get(plan, plan)
    return mw.compile(make(), mw.Plan.parse(plan), batch())


def held(program: mw.Program, places: Places) -> mw.Program:
    """The same program, in which ranks hold the tensors at these coordinates."""
    parameters, buffers = (
        {name: replace(each, held_at=_places(name, places)) for name, each in tensors.items()}
        for tensors in (program.parameters, program.buffers)
    )
    stages = tuple(replace(each, graphs=_idle(each.graphs)) for each in program.stages)
    return replace(program, parameters=parameters, buffers=buffers, stages=stages)


def _idle(graphs: Mapping[Phase, Graph]) -> dict[Phase, Graph]:
    """Graphs that compute nothing."""
    return {phase: replace(each, nodes=each.inputs, outputs=()) for phase, each in graphs.items()}


def _places(name: str, places: Places) -> Places:
    found = next((at for begin, at in places.items() if name.startswith(begin)), None)
    return {} if found is None else {"pp": found}


def give_gradients(run: mw.Run, source: mw.Run) -> None:
    """Give each rank what steps gave it in another run: gradients and buffers that it holds."""
    for own, other in zip(run.states, source.states, strict=True):
        for name, parameter in own.parameters.items():
            gradient = other.parameters[name].grad
            parameter.grad = None if gradient is None else gradient.clone()
        for key in own.tensors.keys() & {("buffer", "steps")}:
            own.tensors[key].copy_(other.tensors[key])
        own.random.step = other.random.step


def equal(one: mw.Run, other: mw.Run) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)

"""Run by every process of a test: rank 1 is interrupted in a step, and saves."""

from __future__ import annotations

from typing import Any

import torch

import meshwright as mw
from tests.runtime.models import PLANS, batch, make


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def main(folder: str) -> None:
    program = mw.compile(make(), mw.Plan.parse(PLANS["tensor"]), batch())
    run = program.launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    if run.states[0].rank == 1:
        mesh: Any = run.transport
        collective, mesh.collective = mesh.collective, interrupted
    try:
        run.step(*batch())
    except KeyboardInterrupt:
        mesh.collective = collective
    except mw.RunError as error:
        print(error)
    for _ in range(2):
        try:
            run.save(folder, optimizer)
        except mw.RunError as error:
            print(error)

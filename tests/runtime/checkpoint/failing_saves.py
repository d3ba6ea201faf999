"""Run by every process of a test: saves that fail on rank 1, and the run goes on."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

import meshwright as mw
from tests.runtime.models import PLANS, batch, make


def attempt(
    run: mw.Run,
    path: Path,
    optimizer: torch.optim.Optimizer,
    trains: torch.optim.Optimizer | None = None,
) -> None:
    """Try to save, print what is raised, and train on with that optimizer, or with `trains`."""
    try:
        run.save(path, optimizer)
        print("saved")
    except mw.RunError as error:
        print(error)
    run.step(*batch())
    (trains or optimizer).step()
    (trains or optimizer).zero_grad()


def main(name: str) -> None:
    folder = Path(name)
    program = mw.compile(make(), mw.Plan.parse(PLANS["tensor"]), batch())
    with program.launch() as run:
        second = run.states[0].rank == 1
        optimizer = run.optimizer(torch.optim.AdamW)
        attempt(run, folder / "common", optimizer)
        attempt(run, folder / "other" if second else folder / "common", optimizer)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if second:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        attempt(run, folder / "common", optimizer)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        foreign = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        attempt(run, folder / "common", foreign if second else optimizer, optimizer)
        attempt(run, None if second else folder / "common", optimizer)  # type: ignore[arg-type]
        fresh = run.optimizer(torch.optim.AdamW)
        attempt(run, folder / "common", fresh if second else optimizer)
        run.load(folder / "common")
        print("steps", int(run.state_dict()["steps"]))
        attempt(run, folder / "common", optimizer)

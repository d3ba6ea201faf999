"""Run by both processes of a test: one rank cannot load, both say so, and the run goes on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import meshwright as mw
from meshwright.runtime.checkpoint import loading
from tests.runtime.models import PLANS, batch, make


def bad_state(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    state = make(seed=4).state_dict()
    if own:
        del state["blocks.1.up.bias"]
    run.load_state_dict(state)


def other_names(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    state = make(seed=4).state_dict()
    if own:
        state["scratch"] = torch.ones(16)
    run.load_state_dict(state)


def no_dictionary(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    run.load_state_dict([] if own else make(seed=4).state_dict())  # type: ignore[arg-type]


def bad_model(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    run.copy_to(torch.nn.Linear(2, 2, bias=False) if own else make())


def no_path(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    run.load(3 if own else folder, optimizer)  # type: ignore[arg-type]


def no_folder(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    run.load("nowhere", optimizer)


def no_optimizer(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    run.load(folder, None if own else optimizer)


def other_options(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    if own:
        optimizer.param_groups[0]["lr"] = "fast"
    run.load(folder, optimizer)


def other_folder(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    other = folder.with_name("elsewhere")
    if own:
        (other / "step-1").mkdir(parents=True)
        shutil.copy(folder / "step-1" / "manifest.json", other / "step-1")
    run.load(other if own else folder, optimizer)


def damaged(run: mw.Run, optimizer: Any, folder: Path, own: bool) -> None:
    """A disk that fails at the last tensor of a rank."""
    original = loading.read_into

    def read_into(*given: Any) -> None:
        if own and given[1] == "scratch":
            raise mw.RunError("cannot read `scratch`: Input/output error", help="see the disk")
        original(*given)

    loading.read_into = read_into
    try:
        run.load(folder, optimizer)
    finally:
        loading.read_into = original


CASES: list[Callable[[mw.Run, Any, Path, bool], None]] = [
    bad_state, other_names, no_dictionary, bad_model, no_path, no_folder, no_optimizer,
    other_options, other_folder, damaged,
]  # fmt: skip


def everything(run: mw.Run, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    (state,) = run.states
    kept = [kept for p in run.parameters() for kept in optimizer.state[p].values()]
    return [tensor.clone() for tensor in (*state.tensors.values(), *kept)]


def main(name: str) -> None:
    folder = Path(name)
    program = mw.compile(make(), mw.Plan.parse(PLANS["tensor"]), batch())
    with program.launch() as run:
        (rank,) = (state.rank for state in run.states)
        for case in CASES:
            optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
            run.step(*batch())
            optimizer.step()
            if case is CASES[0]:
                run.save(folder, optimizer)
                run.step(*batch())
                optimizer.step()
            before = everything(run, optimizer)
            print(f"# {case.__name__}")
            try:
                case(run, optimizer, folder, rank == 1)
                print("loaded")
            except mw.RunError as error:
                print(
                    re.sub(r"[0-9a-f]{32}", "(save)", str(error)).replace(f"{folder.parent}/", "")
                )
            changed = not all(map(torch.equal, everything(run, optimizer), before))
            print("changed" * changed, end="")
            optimizer.param_groups[0]["lr"] = 1e-2
            run.load(folder, optimizer)

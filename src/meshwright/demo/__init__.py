"""The demo: a GPT trained on a mesh of four ranks beside the same GPT in one process.

Started alone, all ranks run in this process; under `meshwright run` or torchrun, each has its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict

import torch
from rich.console import Console

from meshwright.compiler.public import Program
from meshwright.demo import report
from meshwright.demo.corpus import Corpus
from meshwright.demo.model import GPT, LENGTH, PLAN
from meshwright.demo.report import Loss
from meshwright.dsl.plan import Plan
from meshwright.passes import driver
from meshwright.runtime.machine import RUNTIME
from meshwright.runtime.world.rendezvous import under_torchrun

STEPS = 60
BATCH = 16
LEARNING_RATE = 1e-3


def run(steps: int = STEPS, *, as_json: bool = False, console: Console | None = None) -> int:
    """Compile, show, train and compare; return an exit code."""
    started = time.perf_counter()
    console = console or Console(quiet=as_json or not _is_first())
    torch.manual_seed(0)
    model, corpus = GPT(), Corpus()
    report.opening(console, model, corpus)
    example = corpus.batch(BATCH, LENGTH)
    compiled = time.perf_counter()
    program = driver.compile_program(model, Plan.parse(PLAN, "gpt.plan"), example, runtime=RUNTIME)
    report.program(console, program, seconds=time.perf_counter() - compiled)
    losses = train(program, model, corpus, steps, console)
    report.ending(console, losses, seconds=time.perf_counter() - started)
    if as_json and _is_first():
        worst = max(loss.difference for loss in losses)
        found = {"losses": [asdict(loss) for loss in losses], "largest_difference": worst}
        json.dump({**found, "program": program.to_json()}, sys.stdout, indent=2)
        print()
    return 0


def train(program: Program, model: GPT, corpus: Corpus, steps: int, console: Console) -> list[Loss]:
    """Train on the mesh and in one process, from the same weights on the same batches."""
    mesh = program.launch()
    optimizer = mesh.optimizer(torch.optim.AdamW, lr=LEARNING_RATE)
    single = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses: list[Loss] = []
    with report.training(console, steps) as add:
        for step in range(1, steps + 1):
            batch = corpus.batch(BATCH, LENGTH)
            parallel = mesh.step(*batch)
            optimizer.step()
            optimizer.zero_grad()
            alone = model(*batch)
            alone.backward()
            single.step()
            single.zero_grad()
            losses.append(Loss(step, parallel.item(), alone.item()))
            add(losses[-1])
    return losses


def _is_first() -> bool:
    """Whether this process is the one that prints."""
    return not under_torchrun() or os.environ["RANK"] == "0"

"""Peak memory of activations over the number of layers, and what is computed again for it.

    python -m benchmarks.recompute [--layers 8,16,32,64]

A GPT that saves everything, in as many segments as the root of its layers, and under the budget
that the segments need. Nothing runs: memory is that of the walk of the instructions. Minutes.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace

from rich.console import Console
from rich.table import Table

import meshwright
from benchmarks.gpt import SIZES, make_batch, make_model
from meshwright.compiler.graph.text import size_text
from meshwright.compiler.public import Program
from meshwright.compiler.report.recompute import share_recomputed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--layers", default="8,16,32,64")
    depths = [int(each) for each in parser.parse_args().layers.split(",")]
    table = Table("layers", "statement", "activations at the peak", "computed again", "gap", "s")
    for depth in depths:
        parts = f"checkpoint blocks.* segments={round(math.sqrt(depth))}"
        row(table, depth, "")
        segments = row(table, depth, parts)
        row(table, depth, f"checkpoint budget={segments.memory().peak}B")
    Console(width=100).print(table)


def row(table: Table, depth: int, statement: str) -> Program:
    """Compile a model of so many layers under a statement, and add its figures."""
    begun = time.perf_counter()
    program = compiled(depth, statement)
    seconds, memory = time.perf_counter() - begun, program.memory()
    held = memory.parameters + memory.gradients + memory.optimizer
    gap = f"{program.budgeted.gap:.1%}" if program.budgeted else ""
    share = f"{share_recomputed(program):.1%}"
    cells = (str(depth), statement, size_text(memory.peak - held), share, gap, f"{seconds:.1f}")
    table.add_row(*cells)
    return program


def compiled(depth: int, statement: str) -> Program:
    """A GPT of so many layers under a plan with this statement."""
    size = replace(SIZES["tiny"], layers=depth)
    plan = meshwright.Plan.parse(f"mesh dp=1\ndata tokens, targets over dp\n{statement}\n")
    return meshwright.compile(make_model(size), plan, make_batch(size))


if __name__ == "__main__":
    main()

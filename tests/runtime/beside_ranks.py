"""One rank of `test_beside.py`: a step of a pipeline of processes, event by event."""

from __future__ import annotations

import torch

import meshwright as mw
from tests.passes.statements.test_zero_stages import FOUR, Words, words
from tests.runtime.events import events_of
from tests.runtime.same_run import rank_here, virtual


def main(statements: str) -> None:
    """Prints `same` if this rank does what it does on the virtual mesh, in the same order, and has
    the same gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = words()
    program = mw.compile(Words().double(), mw.Plan.parse(FOUR + statements), batch)
    with program.launch() as run:
        (own,) = events_of(run, batch)
        with virtual():
            other = program.launch()
        expected = events_of(other, batch)[rank_here()]
        (ours,), theirs = run.states, other.states[rank_here()]
        pairs = [(p.grad, theirs.parameters[name].grad) for name, p in ours.parameters.items()]
        same = all(a is not None and b is not None and a.equal(b) for a, b in pairs)
        print("same" if same and own == expected else f"{own}\n{expected}")

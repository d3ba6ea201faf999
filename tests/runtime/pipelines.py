"""Programs in stages, each on ranks of its own, and a model for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.public import Program
from meshwright.compiler.schedules.actions import Action, Entry, Link, Receive, Send

F_, B, W = Phase.FORWARD, Phase.BACKWARD, Phase.WEIGHT
Row = Callable[[Sequence[int], int, int], Iterable[tuple[Phase, int, int]]]
"""What a coordinate runs in its loop, given its stages and the numbers of coordinates and of
microbatches: phase, stage and microbatch."""


class Deep(nn.Module):
    """Eight layers, all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x.square().mean()


class Looked(Deep):
    """The same, and at the end a row of a table for each row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 16)
        self.double()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = F.gelu(layer(x))
        return (x * self.table(ids)).square().mean()


PLAN = "mesh pp=2\ndata x, ids\nstages at layers.4 over pp microbatches=4\n"
"""One for `Looked`."""


def batch() -> tuple[Tensor, Tensor]:
    """Eight rows of 16, and eight numbers below 5."""
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, generator=seed, dtype=torch.float64)
    return x, torch.randint(0, 5, (8,), generator=seed)


def one_forward_one_backward(own: Sequence[int], p: int, m: int) -> list[tuple[Phase, int, int]]:
    """1F1B, in which weight gradients come right after their backward."""
    (k,) = own
    ahead = min(m, p - 1 - k)
    found = [(F_, k, i) for i in range(ahead)]
    for i in range(m):
        found += [(F_, k, i + ahead)] * (i + ahead < m) + [(B, k, i), (W, k, i)]
    return found


def breadth_first(own: Sequence[int], p: int, m: int) -> list[tuple[Phase, int, int]]:
    """All forwards, then all backwards, then all weight gradients."""
    found = [(F_, k, i) for k in own for i in range(m)]
    return found + [(phase, k, i) for phase in (B, W) for k in reversed(own) for i in range(m)]


def scheduled(program: Program, row: Row) -> Program:
    """The program, whose stages are dealt to the coordinates along `pp` in turn."""
    p, m = program.mesh.size("pp"), len(program.stages[0].forward.mesh.turns)
    graphs = {(stage.number, phase) for stage in program.stages for phase in stage.graphs}
    rows = []
    for place in range(p):
        own = range(place, len(program.stages), p)
        actions = [Action(Phase.COUNT, k, i) for k in own for i in range(m)]
        actions += [Action(Phase.BEFORE, k) for k in own]
        actions += [Action(*each) for each in row(own, p, m)]
        actions += [Action(Phase.AFTER, k) for k in reversed(own)]
        rows.append([action for action in actions if (action.stage, action.kind) in graphs])
    entries = _with_moves(rows, list(program.transfers.values))
    ranks = range(program.mesh.num_ranks)
    schedule = {rank: entries[program.mesh.coords(rank)["pp"]] for rank in ranks}
    return replace(program, schedule=schedule)


def _with_moves(rows: Sequence[Sequence[Action]], links: Sequence[Link]) -> list[tuple[Entry, ...]]:
    """Rows with what they send one another: all in turn, in one simulation, in which a value is
    received as soon as it is sent."""
    homes = {action: place for place, row in enumerate(rows) for action in row}
    found: list[list[Entry]] = [[] for _ in rows]
    made: set[tuple[Link, int]] = set()
    left = [list(row) for row in rows]
    while any(left):
        ready = [
            place
            for place, row in enumerate(left)
            if row and all((each, row[0].microbatch) in made for each in _into(links, row[0]))
        ]
        assert ready
        for place in ready:
            action = left[place].pop(0)
            found[place].append(action)
            for link in links:
                if (link.source, link.source_phase) == (action.stage, action.kind):
                    made.add((link, action.microbatch))
                    target = homes[Action(link.target_phase, link.target, action.microbatch)]
                    if target != place:
                        found[place].append(Send(link, action.microbatch, target))
                        found[target].append(Receive(link, action.microbatch, place))
    return [tuple(row) for row in found]


def _into(links: Iterable[Link], action: Action) -> list[Link]:
    taker = action.stage, action.kind
    return [each for each in links if (each.target, each.target_phase) == taker]

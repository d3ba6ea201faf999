"""What the demo prints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from meshwright.compiler.graph.ir import INPUT, MeshOp, Node, TensorType
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.public import Program
from meshwright.compiler.report.listing import graph_text
from meshwright.compiler.report.show import tables
from meshwright.compiler.report.summary import summarise
from meshwright.demo.corpus import Corpus
from meshwright.demo.model import GPT, PLAN
from meshwright.runtime.world.rendezvous import under_torchrun

_MODULE = "blocks.0"
_MOVING = {name for name, kind in COLLECTIVES.items() if kind.moves}
_ROWS = 10
"""How many rows of losses are shown."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The losses of one step, on the mesh and in one process."""

    step: int
    mesh: float
    single: float

    @property
    def difference(self) -> float:
        return abs(self.mesh - self.single)


def opening(console: Console, model: GPT, corpus: Corpus) -> None:
    """The model, the text and the plan."""
    num_parameters = sum(p.numel() for p in model.parameters())
    console.rule("[bold]Meshwright")
    console.print(
        f"A byte-level GPT of {num_parameters:,} parameters, ordinary PyTorch, learns to write "
        f"Python: {len(corpus.bytes) / 1e6:.1f} MB of the standard library, "
        f"{corpus.num_files} modules. Nothing in the model knows of devices. The plan does:"
    )
    console.print(Panel(Syntax(PLAN.rstrip(), "text", theme="ansi_dark"), title="gpt.plan"))


def program(console: Console, program: Program, *, seconds: float) -> None:
    """The mesh, the program's tables, and part of the graph of one rank."""
    console.print(f"Compiled in {seconds:.1f} s. ", _mesh_text(program), sep="")
    console.print(tables(summarise(program), console.width))
    console.print(
        f"The feed-forward half of [bold]{_MODULE}[/], rewritten, and its backward. Every byte "
        "that moves is a node:\n"
    )
    console.print(_graph_parts(program), soft_wrap=True)


def _mesh_text(program: Program) -> Text:
    """The ranks as a grid: the first axis down, the second across."""
    (down, rows), (across, columns) = program.mesh.axes
    where = "its own process" if under_torchrun() else "this process"
    text = Text.assemble(
        "The mesh, each rank in ",
        where,
        ":\n\n",
        (f"          {across}=0      {across}=1\n", "dim"),
    )
    for row in range(rows):
        ranks = (program.mesh.rank({down: row, across: column}) for column in range(columns))
        cells = "   ".join(f"[rank {rank}]" for rank in ranks)
        text.append(f"  {down}={row}  ", "dim").append(f"{cells}\n", "cyan")
    return text


def _graph_parts(program: Program) -> Text:
    """The feed-forward half of one block, and its backward."""
    forward, backward = program.graphs().values()
    inside = [node for node in forward.nodes if _belongs(node)]
    reduced = [i for i, node in enumerate(inside) if node.op == MeshOp("all_reduce")]
    shown = inside[reduced[0] + 2 : reduced[1] + 1]
    names = {node.name for node in shown}
    back = [node for node in backward.nodes if _belongs(node) and node.origin.forward in names]
    text = Text()
    for graph, nodes in ((forward, shown), (backward, back)):
        part = replace(graph, nodes=tuple(nodes), outputs=())
        for line in graph_text(part).splitlines():
            moves = line.partition(" = ")[2].partition("(")[0] in _MOVING
            text.append(line + "\n", "bold magenta" if moves else "")
        text.append("\n")
    return text


def _belongs(node: Node) -> bool:
    """Whether a node is in the block, works on activations, and gives one tensor."""
    weights = node.op == MeshOp("vary") and node.args[0].op == INPUT
    inside = any(path == _MODULE for path, _ in node.origin.modules)
    return inside and not weights and isinstance(node.type, TensorType)


@contextlib.contextmanager
def training(console: Console, steps: int) -> Iterator[Callable[[Loss], None]]:
    """Show a table of losses while training goes on; gives the function that adds a step."""
    losses: list[Loss] = []
    try:
        with Live(console=console, refresh_per_second=4, transient=True) as live:

            def add(loss: Loss) -> None:
                losses.append(loss)
                live.update(_table(losses, steps))

            yield add
    finally:
        console.print(_table(losses, steps))


def _table(losses: Sequence[Loss], steps: int) -> Table:
    """The losses of some steps, evenly spread, and of the last one."""
    table = Table(title="loss", title_justify="left", title_style="bold", box=None)
    for heading, style in (
        ("step", "dim"), ("mesh, dp=2 x tp=2", "cyan"), ("one process", "green"),
        ("difference", "dim"),
    ):  # fmt: skip
        table.add_column(heading, justify="right", style=style)
    every = max(1, steps // _ROWS)
    for loss in losses:
        if loss.step % every == 0 or loss in (losses[0], losses[-1]):
            table.add_row(
                f"{loss.step} of {steps}",
                f"{loss.mesh:.6f}",
                f"{loss.single:.6f}",
                f"{loss.difference:.1e}",
            )
    return table


def ending(console: Console, losses: Sequence[Loss], *, seconds: float) -> None:
    """How far apart the two losses came, and what to try next."""
    worst = max(losses, key=lambda loss: loss.difference)
    console.print(
        f"\n{len(losses)} steps, {seconds:.0f} s in all. "
        f"The loss fell from {losses[0].mesh:.2f} to {losses[-1].mesh:.2f}."
    )
    if not under_torchrun():
        console.print(
            "With one process per rank instead: [bold]meshwright demo --processes 4[/]",
            highlight=False,
        )
    console.print(
        "Mesh and single process compute in float32 and add in different orders. "
        f"Largest difference of their losses: [bold]{worst.difference:.1e}[/] (step {worst.step})",
        highlight=False,
    )

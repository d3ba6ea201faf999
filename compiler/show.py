"""What `show` prints: the mesh, layouts, collectives, bytes and memory of a program, as tables."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.compiler.summary import Gather, Held, PlanLine, Summary, Traffic, summarise
from meshwright.dsl.errors import plural

if TYPE_CHECKING:
    from meshwright.compiler.program import Program

WIDTH = 100
"""Columns of the text that does not go to a terminal."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_MODULES = 2
"""How many modules a row names before it only counts them."""


def show(program: Program, *, local: bool = False, console: Console | None = None) -> None:
    """Print a program's tables; with `local`, with the shapes that one rank holds."""
    console = console or Console()
    console.print(tables(summarise(program, local=local)))


def show_text(program: Program, *, local: bool = False) -> str:
    """What `show` prints, as plain text of a fixed width: the same program, the same text."""
    return plain(tables(summarise(program, local=local)))


def plain(renderable: RenderableType) -> str:
    """The text of what rich prints, without colours or trailing blanks."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def tables(summary: Summary) -> RenderableType:
    """All tables, in the order in which one reads them."""
    titled = [
        ("what a rank holds", _held(summary.held)),
        ("what moves in a step", _traffic(summary) if summary.traffic else None),
        (
            "gathered though no line of the plan asks for it",
            _gathers(summary.gathers) if summary.gathers else None,
        ),
        ("what each line of the plan moves", _lines(summary.lines)),
        ("memory of a rank", _memory(summary)),
    ]
    parts = [
        part
        for title, table in titled
        if table is not None
        for part in (Text(f"\n{title}", "bold"), table)
    ]
    return Group(_head(summary), *parts, Text(""))


def size_text(num_bytes: int) -> str:
    """`768 B`, `1.5 KiB`, `12 MiB`."""
    size, unit = float(num_bytes), _UNITS[0]
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.1f} {unit}" if unit != "B" and size < 100 else f"{size:.0f} {unit}"


def _head(summary: Summary) -> Text:
    mesh = ", ".join(f"{axis}={size}" for axis, size in summary.mesh)
    num_ranks = 1
    for _, size in summary.mesh:
        num_ranks *= size
    mode = {"train": "training", "infer": "inference", "eval": "evaluation"}[summary.mode]
    return Text.assemble(
        (summary.model, "bold"), " under ", (summary.plan, "bold"),
        f", compiled for {mode} on {summary.device}\n",
        "mesh ", (mesh, "bold cyan"), f", {plural(num_ranks, 'rank')}",
    )  # fmt: skip


def _table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose columns are (heading, style); a style ending in `>` aligns right."""
    table = Table(box=None, pad_edge=False, show_header=any(heading for heading, _ in columns))
    for heading, style in columns:
        right = style.endswith(">")
        table.add_column(
            heading,
            style=style.rstrip(">") or None,
            justify="right" if right else "left",
            no_wrap=right,
            header_style="dim",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _held(rows: Sequence[Held]) -> Table:
    return _table(
        [("name", ""), ("", "dim>"), ("layout", "cyan"), ("a rank", ">"), ("plan", "dim")],
        (
            (
                row.names,
                f"x {row.count}" if row.count > 1 else "",
                row.type + (f"  {row.note}" if row.note else ""),
                size_text(row.bytes),
                _short(row.plan_line),
            )
            for row in rows
        ),
    )


def _traffic(summary: Summary) -> Table:
    table = _table(
        [
            ("", "dim"),
            ("collective", "magenta"),
            ("", "dim>"),
            ("a rank sends", ">"),
            ("in", ""),
            ("plan", "dim"),
        ],
        (_traffic_row(row) for row in summary.traffic),
    )
    count = sum(row.count for row in summary.traffic)
    total = sum(row.bytes for row in summary.traffic)
    table.add_row("in all", "", f"x {count}", size_text(total), "", "", style="bold")
    for axes, size in summary.bytes_by_axis:
        table.add_row("", f"over {axes}", "", size_text(size), "", "", style="dim")
    return table


def _traffic_row(row: Traffic) -> tuple[str, ...]:
    return (
        row.phase,
        f"{row.kind}[{', '.join(row.axes)}]",
        f"x {row.count}",
        size_text(row.bytes),
        _where(row.modules),
        _short(row.plan_line),
    )


def _where(modules: Sequence[str]) -> str:
    named = ", ".join(modules[:_MODULES])
    return f"{named}, and {len(modules) - _MODULES} more" if len(modules) > _MODULES else named


def _short(places: str) -> str:
    """The lines alone where the plan's name says nothing new: `2, 9` for `a.plan:2, a.plan:9`."""
    return ", ".join(
        place if "__plan__" in place else place.rpartition(":")[2]
        for place in places.split(", ")
        if place
    )


def _gathers(rows: Sequence[Gather]) -> Table:
    return _table(
        [
            ("operator", "yellow"),
            ("", "dim>"),
            ("from", ""),
            ("to", ""),
            ("moves", ">"),
            ("in", ""),
        ],
        (
            (
                row.op if row.has_rule else f"{row.op} (has no rule)",
                f"x {row.count}",
                row.source,
                row.target,
                size_text(row.bytes),
                _where(row.modules),
            )
            for row in rows
        ),
    )


def _lines(rows: Sequence[PlanLine]) -> Table:
    return _table(
        [("", "dim>"), ("statement", ""), ("collectives", ">"), ("bytes", ">")],
        (
            (
                _short(row.place),
                row.text,
                str(row.count) if row.count else "",
                size_text(row.bytes) if row.count else "",
            )
            for row in rows
        ),
    )


def _memory(summary: Summary) -> Table:
    memory = summary.memory
    rows = [
        ("parameters", memory.parameters),
        ("buffers", memory.buffers),
        ("gradients", memory.gradients),
        ("optimizer, two moments", memory.optimizer),
        ("saved for the backward", memory.activations),
        ("peak of a step", memory.peak),
    ]
    return _table(
        [("", ""), ("", "bold>")],
        ((name, size_text(size)) for name, size in rows if size),
    )

"""The tables of `show` as rows of text, before they are laid out for a terminal or a notebook."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshwright.compiler.graph.text import size_text
from meshwright.compiler.report.staging import Passed, Repeated
from meshwright.compiler.report.summary import Gather, Held, PlanLine, Summary, Traffic
from meshwright.dsl.errors import plural

_MODULES = 2
"""How many modules a row names before it only counts them."""
_PATHS = 4
"""How many ways from stage to stage a row names before it only counts them."""
_MOST_PLACES = 8
"""How many places the table of memory has a column for; of more, it has that which needs most."""
_NARROWEST = 12
"""The least width to which a column is narrowed."""
_BREAKS = re.compile(r"(?<=\s)|(?<=,)(?!\s)|(?=\.)")
"""Where a cell may be broken: after blanks and commas, and before a name's dots."""
_WORDS = re.compile(r"(?<=\s)")
_NAMES = re.compile(r"(?=\.)")
_ITEMS = re.compile(r"(?<=, )")


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, a style of rich's, and how cells are laid out."""

    heading: str
    style: str = ""
    right: bool = False
    fixed: bool = False
    """Whether no cell is ever broken; those aligned to the right never are."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: rows, then rows that sum them up."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    totals: tuple[tuple[str, ...], ...] = ()

    def widths(self, width: int) -> list[int]:
        """The widths of the columns: the table fits `width` if its cells can be broken so far."""
        every = [tuple(column.heading for column in self.columns), *self.rows, *self.totals]
        natural = [max(map(len, cells)) for cells in zip(*every, strict=True)]
        least = [
            natural[i] if column.right or column.fixed else max(map(_narrowest, cells))
            for i, (column, cells) in enumerate(
                zip(self.columns, zip(*every, strict=True), strict=True)
            )
        ]
        room = width - 2 * (len(natural) - 1)
        found = list(natural)
        while sum(found) > room:
            widest = max(range(len(found)), key=lambda i: found[i] if found[i] > least[i] else 0)
            if found[widest] <= least[widest]:
                break
            found[widest] -= 1
        return found


def _narrowest(cell: str) -> int:
    pieces = [len(piece.rstrip()) for piece in _BREAKS.split(cell)]
    return max(min(len(cell), _NARROWEST), pieces[0], *(2 + piece for piece in pieces[1:]), 0)


def broken(cell: str, width: int) -> str:
    """A cell in lines of at most `width` columns, the later ones indented.

    A list is broken between its items, and an item only where it does not fit a line of its own.
    """
    lines = [""]
    pieces = [cell]
    for breaks in (_ITEMS, _WORDS, _NAMES, _BREAKS):
        pieces = [
            part
            for piece in pieces
            for part in ([piece] if len(piece.rstrip()) <= width - 2 else breaks.split(piece))
        ]
    for piece in pieces:
        if lines[-1].strip() and len(lines[-1] + piece.rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def sheets(summary: Summary) -> tuple[Sheet, ...]:
    """All tables that have rows, in reading order."""
    every = (
        _stages(summary),
        _held(summary.held),
        _traffic(summary),
        _passed(summary.passed),
        _repeated(summary.repeated),
        _gathers(summary.gathers),
        _lines(summary.lines),
        _memory(summary),
    )
    return tuple(sheet for sheet in every if sheet.rows)


def _stages(summary: Summary) -> Sheet:
    columns = (
        Column("", "dim", right=True),
        Column("at", "bold", fixed=True),
        Column("runs"),
        Column("parameters", right=True),
        Column("saved per microbatch", right=True),
    )
    rows = tuple(
        (
            str(each.number),
            each.at,
            ", ".join(each.modules),
            f"{each.num_parameters:,}",
            size_text(each.saved),
        )
        for each in summary.stages
    )
    return Sheet(f"the stages; {summary.schedule}", columns, rows)


def _passed(rows: Sequence[Passed]) -> Sheet:
    columns = (
        Column("", "dim"),
        Column("value", "cyan"),
        Column("from stage to stage"),
        Column("", "dim", right=True),
        Column("each", right=True),
        Column("of"),
    )
    cells = tuple(
        (
            row.phase,
            row.type,
            _some([" > ".join(map(str, path)) for path in row.paths], _PATHS),
            f"x {row.times}",
            size_text(row.bytes),
            _where(row.modules),
        )
        for row in rows
    )
    return Sheet("what stages send one another in a step", columns, cells)


def _repeated(rows: Sequence[Repeated]) -> Sheet:
    columns = (Column("value", "cyan"), Column("in stages"), Column("of"))
    cells = tuple((row.type, _some(list(map(str, row.stages)), 8), row.module) for row in rows)
    return Sheet("computed again in each stage that takes it, and not sent", columns, cells)


def _held(rows: Sequence[Held]) -> Sheet:
    columns = (
        Column("name"),
        Column("", "dim", right=True),
        Column("layout", "cyan"),
        Column("per rank", right=True),
        Column("plan", "dim"),
    )
    return Sheet("what each rank holds", columns, tuple(map(_held_row, rows)))


def _held_row(row: Held) -> tuple[str, ...]:
    return (
        row.names,
        f"x {row.count}" if row.count > 1 else "",
        row.type + (f"  {row.note}" if row.note else ""),
        size_text(row.bytes),
        _short(row.plan_line),
    )


def _traffic(summary: Summary) -> Sheet:
    columns = (
        Column("", "dim"),
        Column("collective", "magenta", fixed=True),
        Column("", "dim", right=True),
        Column("sent per rank", right=True),
        Column("in"),
        Column("plan", "dim"),
    )
    count = sum(row.count for row in summary.traffic)
    total = sum(row.bytes for row in summary.traffic)
    sent = sorted(summary.sent, key=lambda each: -each[2])[:_MOST_PLACES] or [("", count, total)]
    places = [each for each in summary.sent if each in sent] or sent
    totals = [
        ("in all", f"at {place}" if place else "", f"x {count}", size_text(total), "", "")
        for place, count, total in places
    ]
    totals += [
        ("", f"over {axes}", "", size_text(size), "", "") for axes, size in summary.bytes_by_axis
    ]
    rows = tuple(map(_traffic_row, summary.traffic))
    title = "what moves in a step" + "; of each, by the rank that sends most" * bool(summary.sent)
    return Sheet(title, columns, rows, tuple(totals))


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
    return _some(modules, _MODULES)


def _some(texts: Sequence[str], most: int) -> str:
    """The first of many, and how many more there are."""
    named = ", ".join(texts[:most])
    return f"{named}, and {len(texts) - most} more" if len(texts) > most else named


def _short(places: str) -> str:
    """The line numbers of a plan's own statements: `2, 9` for `a.plan:2, a.plan:9`."""
    return ", ".join(
        place if "__plan__" in place else place.rpartition(":")[2]
        for place in places.split(", ")
        if place
    )


def _gathers(rows: Sequence[Gather]) -> Sheet:
    columns = (
        Column("operator", "yellow"),
        Column("", "dim", right=True),
        Column("from"),
        Column("to"),
        Column("sent per rank", right=True),
        Column("in"),
    )
    title = "gathered though no line of the plan asks for it"
    return Sheet(title, columns, tuple(map(_gather_row, rows)))


def _gather_row(row: Gather) -> tuple[str, ...]:
    return (
        row.op if row.has_rule else f"{row.op} (has no rule)",
        f"x {row.count}",
        row.source,
        row.target,
        size_text(row.bytes),
        _where(row.modules),
    )


def _lines(rows: Sequence[PlanLine]) -> Sheet:
    columns = (
        Column("", "dim", right=True),
        Column("statement"),
        Column("collectives", right=True),
        Column("sent per rank", right=True),
    )
    return Sheet("what each line of the plan moves in a step", columns, tuple(_line_rows(rows)))


def _line_rows(rows: Sequence[PlanLine]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        moved = (str(row.count), size_text(row.bytes)) if row.count else ("", "")
        yield (_short(row.place), row.text, *moved)


def _memory(summary: Summary) -> Sheet:
    places = dict(summary.memories)
    if not 1 < len(places) <= _MOST_PLACES:
        places = {"": summary.memory}
    rows = (
        ("parameters", "parameters"),
        ("buffers", "buffers"),
        ("gradients", "gradients"),
        ("optimizer, two moments", "optimizer"),
        ("saved for the backward", "activations"),
        ("peak of a step", "peak"),
    )
    sizes = ((name, [getattr(each, key) for each in places.values()]) for name, key in rows)
    kept = tuple((name, *map(size_text, found)) for name, found in sizes if any(found))
    columns = (Column(place, "bold", right=True) for place in places)
    most = "memory per rank" + (", of the rank that needs most" if summary.memories else "")
    return Sheet("memory per rank" if len(places) > 1 else most, (Column(""), *columns), kept)


def heading(summary: Summary) -> tuple[str, ...]:
    """Lines that say what is compiled under which plan, for which mesh, and how even its stages
    are, if they were chosen."""
    mode = {"train": "training", "infer": "inference", "eval": "evaluation"}[summary.mode]
    axes = ", ".join(f"{axis}={size}" for axis, size in summary.mesh)
    num_ranks = math.prod(size for _, size in summary.mesh)
    lines = (
        f"{summary.model} under {summary.plan}, compiled for {mode} on {summary.device}",
        f"mesh {axes}, {plural(num_ranks, 'rank')}",
    )
    if (found := summary.balance) is None:
        return lines
    most = f"{found.imbalance:.2f} times the mean"
    return (*lines, f"stages chosen by {found.by}: the rank that has most has {most}")

"""The tables of `show` as rows of text, before they are laid out for a terminal or a notebook."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from meshwright.compiler.graph.text import size_text
from meshwright.compiler.program import Budgeted
from meshwright.compiler.report.memory.holding import places_sheet
from meshwright.compiler.report.recompute import Recomputed, flops_text
from meshwright.compiler.report.sheet import Column, Sheet
from meshwright.compiler.report.staging import Passed, Repeated
from meshwright.compiler.report.summary import Gather, Held, PlanLine, SharedRow, Summary, Traffic
from meshwright.dsl.errors import plural

_MODULES = 2
"""How many modules a row names before it only counts them."""
_PATHS = 4
"""How many ways from stage to stage a row names before it only counts them."""
_NAMES = 4
"""How many parameters a row names before it only counts them."""
_MOST_PLACES = 8
"""How many places the table of memory has a column for; of more, it has that which needs most."""


def sheets(summary: Summary) -> tuple[Sheet, ...]:
    """All tables that have rows, in reading order."""
    every = (
        _stages(summary),
        _held(summary.held),
        _shared(summary.shared),
        _traffic(summary),
        _passed(summary.passed),
        _repeated(summary.repeated),
        _recomputed(summary.recomputed, summary.share_recomputed),
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
        Column("stages"),
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


def _recomputed(rows: Sequence[Recomputed], share: float) -> Sheet:
    columns = (
        Column("regions"),
        Column("", "dim", right=True),
        Column("operators of each", right=True),
        Column("operations per rank", right=True),
        Column("plan", "dim"),
    )
    cells = tuple(
        (
            _where(row.regions),
            f"x {row.count}" if row.count > 1 else "",
            str(row.operators),
            flops_text(row.flops),
            _short(row.plan_line),
        )
        for row in rows
    )
    more = f"computed again in the backward of a step: {share:.1%} more operations per rank"
    return Sheet(more, columns, cells)


def _held(rows: Sequence[Held]) -> Sheet:
    columns = (
        Column("name"),
        Column("", "dim", right=True),
        Column("layout", "cyan"),
        Column("per rank", right=True),
        Column("plan", "dim"),
    )
    return Sheet("what each rank holds", columns, tuple(map(_held_row, rows)))


def _shared(rows: Sequence[SharedRow]) -> Sheet:
    columns = (
        Column("layers"),
        Column("use those of"),
        Column("parameters"),
        Column("plan", "dim"),
    )
    cells = tuple(
        (_where(row.layers), row.first, _some(row.parameters, _NAMES), _short(row.plan_line))
        for row in rows
    )
    return Sheet("parameters that layers share until they are delinked", columns, cells)


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
    most = "memory per rank" + (", of the rank that needs most" if summary.memories else "")
    return places_sheet(places, "memory per rank" if len(places) > 1 else most)


def heading(summary: Summary) -> tuple[str, ...]:
    """Lines that say what is compiled under which plan, for which mesh, and how even its stages
    are, if they were chosen."""
    mode = {"train": "training", "infer": "inference", "eval": "evaluation"}[summary.mode]
    axes = ", ".join(f"{axis}={size}" for axis, size in summary.mesh)
    num_ranks = math.prod(size for _, size in summary.mesh)
    lines: tuple[str, ...] = (
        f"{summary.model} under {summary.plan}, compiled for {mode} on {summary.device}",
        f"mesh {axes}, {plural(num_ranks, 'rank')}",
    )
    if (found := summary.balance) is not None:
        most = f"{found.imbalance:.2f} times the mean"
        lines = (*lines, f"stages chosen by {found.by}: the rank that has most has {most}")
    if (chosen := summary.budgeted) is not None:
        lines = (*lines, *_chosen(chosen))
    return lines


def _chosen(found: Budgeted) -> Iterator[str]:
    """What a budget has led to."""
    peak, budget = size_text(found.peak), size_text(found.budget)
    yield f"chosen for a budget of {budget}, with which a rank needs at most {peak}"
    if found.operations:
        yield (
            f"without regions it needs {size_text(found.without)}; at most {found.gap:.1%} of what "
            "they cost could be saved by others"
        )
    yield from found.statements

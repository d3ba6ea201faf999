"""Schedules as text: the tables that users write, one line per rank of the pipeline.

    0F0,0F1,,0B0,,0B1
    ,1F0,1I0,1F1,1W0,1B1

Each cell has a stage, a kind and a microbatch. `F` is a forward, `I` a backward for inputs, `W` one
for weights, `B` both; `(1F1;1B0)OVERLAP_F_B` a forward and a backward that may overlap. Empty cells
and blanks mean nothing. torch.distributed.pipelining writes and reads the same text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from meshwright.compiler.schedules.actions import Action, actions_of
from meshwright.compiler.schedules.faults import find_fault
from meshwright.compiler.schedules.routes import LOOPED, chain
from meshwright.compiler.schedules.simulate import is_whole
from meshwright.compiler.schedules.tables import B, F, Size, Table, W
from meshwright.dsl.errors import PlanError, plural, quoted
from meshwright.dsl.files import read_file
from meshwright.dsl.source import Source, Span, make_span
from meshwright.dsl.statements import Stages

_CELL = re.compile(r"(\d{1,9})([FIWB])(\d{1,9})")
_PAIR = re.compile(r"\(\s*(\d{1,9}F\d{1,9})\s*;\s*(\d{1,9}B\d{1,9})\s*\)OVERLAP_F_B")
_KINDS = {"F": (F,), "I": (B,), "W": (W,), "B": (B, W)}
_LETTERS = {F: "F", B: "I", W: "W"}


def table_text(table: Table) -> str:
    """A table as such text, without what is sent; `read_table` reads it."""
    return "".join(",".join(cells(table, c)) + "\n" for c in table.coordinates)


def cells(table: Table, coordinate: int) -> Iterator[str]:
    """The cells of one line."""
    left = [a for a in actions_of(table.rows[coordinate]) if a.kind in LOOPED]
    while left:
        if left[0] in table.overlapped:
            forward, backward = cell(left.pop(0)), cell(left[0], "B")
            yield f"({forward};{backward})OVERLAP_F_B"
        else:
            yield cell(left[0], "B" if is_whole(left[:2]) else "")
        del left[: 2 if is_whole(left[:2]) else 1]


def cell(action: Action, letter: str = "") -> str:
    """`0F3`, or with another letter."""
    return f"{action.stage}{letter or _LETTERS[action.kind]}{action.microbatch}"


def loaded_table(statement: Stages, size: Size) -> Table:
    """The table in the file that a statement names.

    Raises `PlanError`: P113 for a file that cannot be read, and P307, with the line and the cell,
    for a table that cannot be carried out with so many ranks, stages and microbatches.
    """
    path, named = statement.schedule.strip("\"'"), statement.at("schedule")
    try:
        text = read_file(path)
    except PlanError as error:
        help = error.help.replace("of the plan", "of the schedule, from the current folder on")
        spans = [*error.spans, *filter(None, [named])]
        raise PlanError("P113", error.message, spans=spans, help=help) from None
    return read_table(Source(Path(path).name, text), size, named)


def read_table(source: Source, size: Size, named: Span | None = None) -> Table:
    """The table in the text of a file, which is named at a place of the plan."""
    rows = [list(_read_line(source, number, named)) for number in range(1, 1 + len(source.lines))]
    while rows and not rows[-1]:
        rows.pop()
    start = make_span(source, (1, 1), (1, 2))
    if len(rows) != size.coordinates:
        if len(rows) > size.coordinates:
            first = size.coordinates + 1
            start = make_span(source, (first, 1), (first, 2))
        what = f"the file has {plural(len(rows), 'line')} for {plural(size.coordinates, 'rank')}"
        raise _wrong(what, [start, named], "write one line per rank, with what it runs in order")
    num_stages = size.coordinates * size.virtual
    every = [each for row in rows for each in row]
    _check_range(every, "stage", num_stages, "another `virtual=`", named)
    most = max((each.action.microbatch for each in every), default=0) + 1
    _check_range(every, "microbatch", size.microbatches, f"`microbatches={most}`", named)
    left = sorted({*range(num_stages)} - {each.action.stage for each in every})
    if left:
        what = f"no rank runs stage {left[0]}, and the plan has {plural(num_stages, 'stage')}"
        raise _wrong(what, [start, named], "add it to a line, or write another `virtual=`")
    table = _table_of(rows, size.microbatches, num_stages)
    graphs = frozenset((stage, kind) for stage in range(num_stages) for kind in LOOPED)
    if fault := find_fault(table, graphs, chain(num_stages), sends=False):
        place = fault.place
        line = make_span(source, (fault.coordinate + 1, 1), (fault.coordinate + 1, 2))
        span = line if place is None else rows[fault.coordinate][place].span
        raise _wrong(str(fault), [span, named], "correct the line, or name a schedule")
    copies = [len(held) for held in table.holders]
    if max(copies) > 2:
        what = f"stage {copies.index(max(copies))} is on {max(copies)} ranks"
        raise _wrong(what, [start, named], "let every stage be on one rank, or every stage on two")
    if len(set(copies)) > 1:
        what = f"stage 0 is on {plural(copies[0], 'rank')}, and others on more or less"
        raise _wrong(what, [start, named], "let every stage be on the same number of ranks")
    return table


def _check_range(
    every: Iterable[_Read], part: str, count: int, other: str, named: Span | None
) -> None:
    """Raises `PlanError` for a cell of a stage or microbatch that the plan does not have."""
    for each in every:
        number: int = getattr(each.action, part)
        if number >= count:
            what = f"{part} {number} is not there: the plan has {plural(count, part)}"
            raise _wrong(what, [each.span, named], f"correct the cell, or write {other}")


def _wrong(what: str, spans: Iterable[Span | None], help: str) -> PlanError:
    return PlanError("P307", what, spans=spans, help=help)


@dataclass(frozen=True, slots=True)
class _Read:
    """An action, where its cell stands, and whether it is overlapped with what follows."""

    action: Action
    span: Span
    overlapped: bool = False


def _read_line(source: Source, number: int, named: Span | None) -> Iterator[_Read]:
    column = 1
    for cell in source.line(number).split(","):
        text = cell.strip()
        start = column + len(cell) - len(cell.lstrip())
        span = make_span(source, (number, start), (number, start + len(text)))
        column += len(cell) + 1
        if pair := _PAIR.fullmatch(text):
            forward, *backward = (a for part in pair.groups() for a in _actions(part, span, named))
            yield _Read(forward, span, overlapped=True)
            yield from (_Read(action, span) for action in backward)
        elif text:
            yield from (_Read(action, span) for action in _actions(text, span, named))


def _actions(text: str, span: Span, named: Span | None) -> Iterator[Action]:
    found = _CELL.fullmatch(text)
    if found is None:
        help = "write a stage, `F`, `I`, `W` or `B`, and a microbatch: `0F3`"
        if "SEND" in text or "RECV" in text or "SHARD" in text or "REDUCE" in text:
            help = "leave it out: what ranks send, gather and reduce follows from what they run"
        raise _wrong(f"cannot read {quoted(text)}", [span, named], help)
    stage, letter, microbatch = found.groups()
    yield from (Action(kind, int(stage), int(microbatch)) for kind in _KINDS[letter])


def _table_of(rows: list[list[_Read]], microbatches: int, num_stages: int) -> Table:
    held: list[list[int]] = [[] for _ in range(num_stages)]
    for c, row in enumerate(rows):
        for stage in {each.action.stage for each in row}:
            held[stage].append(c)
    return Table(
        microbatches,
        tuple(tuple(coordinates) or (0,) for coordinates in held),
        tuple(tuple(each.action for each in row) for row in rows),
        frozenset(each.action for row in rows for each in row if each.overlapped),
    )

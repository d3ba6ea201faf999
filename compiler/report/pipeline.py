"""The schedule of a program as text: what each rank of the pipeline runs, and when it would.

rank 0  0F0 >1 <1 0F1 >1 <1 0I0 0W0 0I1 0W1
rank 1  <0 1F0 <0 1I0 >0 1W0 1F1 1I1 >0 1W1

rank 0  0F0 0F1 ······· 0I0 0W0 0I1 0W1
rank 1  ··· 1F0 1I0 1F1 1W0 1I1 1W1 ···
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from meshwright.compiler.errors import CompilerError
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.report.show import WIDTH, plain, print_whole
from meshwright.compiler.schedules.actions import Action, Entry, Link, Send
from meshwright.compiler.schedules.files import cell
from meshwright.compiler.schedules.simulate import Costs, Simulation, Simulator, in_flight
from meshwright.compiler.schedules.tables import B, F, Table, W
from meshwright.dsl.errors import did_you_mean, plural, spelled
from meshwright.dsl.writing.html import html_text

_STYLES = {F: "blue", B: "green", W: "yellow"}
_LEGEND = """\
0F1: forward, stage 0, microbatch 1; I, W: backward for inputs, weights; B: both
C: count; before, sum, after: once, around all that; &: may overlap what follows
>1: send to rank 1; <1: begin to receive from it"""
_LETTERS = {Phase.COUNT: "C", Phase.BEFORE: "before", Phase.SUM: "sum", Phase.AFTER: "after"}
_MOST = 12
"""The most columns per action, on average; of uneven costs the short ones lose their names then."""
_LEAST = 1e-100
"""The smallest cost that is not 0, so that no sum or share of costs is beyond floats."""
CostsGiven = Mapping[str, float | Sequence[float]]
"""Costs as users write them: by kind, one number for each stage or one for all."""


@dataclass(frozen=True, slots=True)
class Assumed:
    """What actions are assumed to cost, in which unit, and where that is known from."""

    costs: Costs
    source: str
    seconds: bool = False

    def text(self, time: float) -> str:
        """A time as text."""
        return f"{1000 * time:.3g} ms" if self.seconds else f"{time:g}"


@dataclass(frozen=True, repr=False)
class PipelineSchedule:
    """The schedule of a pipeline: what each rank runs, sends and receives in a step, and when.

    It prints as text: the table, a timeline, and what they come to. Times are in seconds where
    costs were measured, and in the unit of the given costs elsewhere.
    """

    table: Table
    links: tuple[Link, ...]
    assumed: Assumed

    @cached_property
    def simulation(self) -> Simulation:
        """When each action of the loop over microbatches runs."""
        return Simulator(self.table, self.links).run(self.assumed.costs)

    @property
    def step_time(self) -> float:
        """The time from the first start of a rank to the last end of any."""
        return self.simulation.makespan

    @property
    def window(self) -> float:
        """The longest time from the first start to the last end of one rank."""
        return self.simulation.window

    @property
    def bubble_fraction(self) -> float:
        """The share of the step in which a rank computes nothing, on average."""
        return self.simulation.bubble_fraction

    @property
    def activations(self) -> tuple[int, ...]:
        """By rank of the pipeline: the most activations that it holds at once, of which each is of
        one stage and one microbatch."""
        return tuple(in_flight(self.table, c) for c in self.table.coordinates)

    @property
    def num_messages(self) -> int:
        """How many times values go from one rank of the pipeline to another, in a step."""
        return sum(isinstance(entry, Send) for row in self.table.rows for entry in row)

    def text(self, width: int = WIDTH) -> str:
        """The text, made to fit `width` columns."""
        return plain(self._parts(width))

    def print(self, console: Console | None = None) -> None:
        """Print the text on `console`, by default the terminal, in colours where it has them."""
        console = console or Console()
        print_whole(console, self._parts(console.width))

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        p, stages = plural(len(self.table.rows), "rank"), plural(len(self.table.holders), "stage")
        return (
            f"<PipelineSchedule of {p}, {stages}: step {self.assumed.text(self.step_time)}, "
            f"bubble {100 * self.bubble_fraction:.1f}%>"
        )

    def _repr_html_(self) -> str:
        return html_text(self.text())

    def to_json(self) -> dict[str, object]:
        """The same as plain dictionaries and lists: what ranks run in order, and when."""
        costs = self.assumed.costs
        return {
            "microbatches": self.table.microbatches,
            "stages": [list(held) for held in self.table.holders],
            "ranks": [[str(entry) for entry in row] for row in self.table.rows],
            "costs": {
                "source": self.assumed.source,
                "unit": "seconds" if self.assumed.seconds else None,
                "forward": list(costs.forward),
                "backward": list(costs.backward),
                "weight": list(costs.weight),
                "hop": costs.hop,
            },
            "times": [
                [{"action": str(each.action), "start": each.start, "end": each.end} for each in row]
                for row in self.simulation.rows
            ],
            "step_time": self.step_time,
            "window": self.window,
            "bubble_fraction": self.bubble_fraction,
            "activations": list(self.activations),
            "messages": self.num_messages,
        }

    def _parts(self, width: int) -> Group:
        table = self.table
        p, stages = plural(len(table.rows), "rank"), plural(len(table.holders), "stage")
        parts = [Text(f"{p}, {stages}, microbatches: {table.microbatches}", "bold")]
        parts += [Text(_LEGEND, "dim"), Text(), *_table_rows(table, width)]
        parts += [*_wrapped(list(_timeline(table, self.simulation)), width), Text()]
        parts += [Text(line) for line in self._totals()]
        return Group(*parts)

    def _totals(self) -> Iterator[str]:
        spell = self.assumed.text
        idle = f"{100 * self.bubble_fraction:.1f}%"
        times = f"step: {spell(self.step_time)}; longest of one rank: {spell(self.window)}"
        yield f"costs: {self.assumed.source}"
        yield f"{times}; bubble: {idle}"
        counts = " ".join(map(str, self.activations))
        yield f"most activations at once (one stage, one microbatch), by rank: {counts}"
        yield f"messages per step: {self.num_messages}"


def equal_costs(num_stages: int) -> Assumed:
    """Every action costs one unit of time, and what is sent is there at once."""
    return Assumed(Costs.equal(num_stages), "1 for every action")


def given_costs(given: CostsGiven, num_stages: int) -> Assumed:
    """Costs that a user gave. Raises `CompilerError` for costs that cannot be."""
    example = '`costs={"forward": 1, "backward": 1, "weight": [1, 2], "hop": 0.1}`'
    if not isinstance(given, Mapping):
        raise CompilerError(f"`costs` is {spelled(given)}", help=f"write {example}")
    kinds = ("forward", "backward", "weight", "hop")
    for kind in given:
        if kind not in kinds:
            raise CompilerError(
                f"`costs` has the unknown key {spelled(kind)}", help=did_you_mean(str(kind), kinds)
            )
    found: dict[str, list[float]] = {}
    for kind in kinds:
        if kind not in given and kind != "hop":
            raise CompilerError(f"`costs` is missing `{kind}`", help=f"write {example}")
        value: Any = given.get(kind, 0)
        each: list[float] = (
            list(value) if isinstance(value, (list, tuple)) and kind != "hop" else [value]
        )
        if not all(map(_is_cost, each)):
            raise CompilerError(
                f"`{kind}` in `costs` is {spelled(value)}",
                help="give numbers that are at least 0, one for each stage or one for all",
            )
        if len(each) not in (1, num_stages):
            raise CompilerError(
                f"`{kind}` in `costs` has {plural(len(each), 'number')} "
                f"for {plural(num_stages, 'stage')}",
                help="give one number for each stage, or one for all",
            )
        found[kind] = each * num_stages if len(each) == 1 else each
    (hop, *_) = found.pop("hop")
    return Assumed(Costs(**found, hop=hop), "as given")


def _is_cost(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and (value == 0 or _LEAST <= value <= 1 / _LEAST)  # type: ignore[operator]


def _table_rows(table: Table, width: int) -> Iterator[Text]:
    """What each rank runs, sends and receives, under each other."""
    for c, row in enumerate(table.rows):
        head = _head(c, len(table.rows))
        cells = " ".join(_cell(entry, table) for entry in row)
        lines = textwrap.wrap(cells, max(20, width - len(head)), break_on_hyphens=False) or [""]
        for line in lines:
            yield Text.assemble((head, "dim"), line)
            head = " " * len(head)


def _cell(entry: Entry, table: Table) -> str:
    if not isinstance(entry, Action):
        return f"{'>' if isinstance(entry, Send) else '<'}{entry.peer}"
    if entry.kind.once:
        return f"{entry.stage}{_LETTERS[entry.kind]}"
    return _name(entry, table) + ("&" if entry in table.overlapped else "")


def _name(action: Action, table: Table) -> str:
    """`0F1`; a backward that computes gradients of weights too is `0B1`."""
    weights = replace(action, kind=W)
    whole = action.kind is B and not any(weights in row for row in table.rows)
    return cell(action, "B" if whole else _LETTERS.get(action.kind, ""))


def _timeline(table: Table, simulation: Simulation) -> Iterator[Text]:
    """One row per rank, in which columns are time; a blank ends an action, if there is room."""
    ran = [each for row in simulation.rows for each in row]
    begin = min(each.start for each in ran)
    shortest = min((each.end - each.start for each in ran if each.end > each.start), default=1)
    names = max(len(cell(each.action)) for each in ran)
    longest = max(len(row) for row in simulation.rows)
    scale = min((names + 1) / shortest, _MOST * longest / max(simulation.makespan, shortest))
    end = round(simulation.makespan * scale)
    for row in simulation.rows:
        text = Text()
        for each in row:
            start, stop = (round((time - begin) * scale) for time in (each.start, each.end))
            text.append(_idle(text, start), "dim")
            block = _name(each.action, table).ljust(stop - start - 1, "─") + " "
            text.append(block[: stop - start], _STYLES[each.action.kind])
        text.append(_idle(text, end), "dim")
        yield text


def _idle(text: Text, until: int) -> str:
    return ("·" * (until - len(text) - 1) + " ")[: max(0, until - len(text))]


def _wrapped(rows: list[Text], width: int) -> Iterator[Text]:
    """The rows under each other, in panels that fit `width`."""
    heads = [_head(c, len(rows)) for c in range(len(rows))]
    room = max(20, width - len(heads[0]))
    for start in range(0, max(len(row) for row in rows), room):
        yield Text()
        for head, row in zip(heads, rows, strict=True):
            yield Text.assemble((head, "dim"), row[start : start + room])


def _head(coordinate: int, count: int) -> str:
    return f"rank {coordinate}".ljust(len(f"rank {count - 1}")) + "  "

"""The schedule of a program as text: what each rank of the pipeline runs, and when it would.

rank 0  0F0 >1 <1 0F1 >1 <1 0I0 0W0 0I1 0W1
rank 1  <0 1F0 <0 1I0 >0 1W0 1F1 1I1 >0 1W1

rank 0  0F0 0F1 ······· 0I0 0W0 0I1 0W1
rank 1  ··· 1F0 1I0 1F1 1W0 1I1 1W1 ···
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from rich.console import Console, Group
from rich.text import Text

from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.report.assumed import Assumed
from meshwright.compiler.report.tables import WIDTH, plain, print_whole
from meshwright.compiler.schedules.actions import Action, Entry, Link, Send
from meshwright.compiler.schedules.files import cell
from meshwright.compiler.schedules.routes import LOOPED
from meshwright.compiler.schedules.simulate import Simulation, Simulator, in_flight
from meshwright.compiler.schedules.tables import B, F, Table, W
from meshwright.dsl.errors import plural
from meshwright.dsl.writing.html import html_text

_STYLES = {F: "blue", B: "green", W: "yellow"}
_LEGEND = """\
0F1: forward, stage 0, microbatch 1; I, W: backward for inputs, weights; B: both
C: count; before, sum, after, results: once; &: may overlap what follows
>1: send to rank 1; <1: begin to receive from it"""
_ONCE = (phase for phase in Phase if phase.once)
_LETTERS = {Phase.COUNT: "C", **{phase: phase.value for phase in _ONCE}}
_MOST = 12
"""The most columns per action, on average; of uneven costs the short ones lose their names then."""


@dataclass(frozen=True, repr=False)
class PipelineSchedule:
    """The schedule of a pipeline: what each rank runs, sends and receives in a step, and when.

    It prints as text: the table, a timeline, and what they come to. Times are in seconds where
    costs were measured, in FLOPs where they were counted, and else in the unit of the given costs.
    """

    table: Table
    links: tuple[Link, ...]
    assumed: Assumed

    @cached_property
    def simulation(self) -> Simulation:
        """When each action runs."""
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
                "unit": self.assumed.unit or None,
                "forward": list(costs.forward),
                "backward": list(costs.backward),
                "weight": list(costs.weight),
                "hop": costs.hop,
                **{phase.value: list(each) for phase, each in costs.around.items()},
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
        parts += [
            Text(line)
            for text in self._totals()
            for line in textwrap.wrap(text, width, subsequent_indent="    ")
        ]
        return Group(*parts)

    def _totals(self) -> Iterator[str]:
        spell, costs = self.assumed.text, self.assumed.costs
        idle = f"{100 * self.bubble_fraction:.1f}%"
        times = f"step: {spell(self.step_time)}; longest of one rank: {spell(self.window)}"
        yield f"costs: {self.assumed.source}"
        looped = zip(LOOPED, (costs.forward, costs.backward, costs.weight), strict=True)
        for phase, each in (*looped, *costs.around.items()) if self.assumed.by_stage else ():
            yield f"  {phase.value}, by stage: {', '.join(map(spell, each))}"
        if costs.hop:
            yield f"  hop: {spell(costs.hop)}"
        yield f"{times}; bubble: {idle}"
        counts = " ".join(map(str, self.activations))
        yield f"most activations at once (one stage, one microbatch), by rank: {counts}"
        yield f"messages per step: {self.num_messages}"


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
    return _name(entry, table) + ("&" if entry in table.overlapped else "")


def _name(action: Action, table: Table) -> str:
    """`0F1`; a backward that computes gradients of weights too is `0B1`."""
    if action.kind.once:
        return f"{action.stage}{_LETTERS[action.kind]}"
    weights = replace(action, kind=W)
    whole = action.kind is B and not any(weights in row for row in table.rows)
    return cell(action, "B" if whole else _LETTERS.get(action.kind, ""))


def _timeline(table: Table, simulation: Simulation) -> Iterator[Text]:
    """One row per rank, in which columns are time; a blank ends an action, if there is room."""
    rows = [[each for each in row if each.action.kind in LOOPED] for row in simulation.rows]
    ran = [each for row in rows for each in row]
    shortest = min((each.end - each.start for each in ran if each.end > each.start), default=1)
    names = max(len(cell(each.action)) for each in ran)
    longest = max(map(len, rows))
    scale = min((names + 1) / shortest, _MOST * longest / max(simulation.makespan, shortest))
    end = round(simulation.makespan * scale)
    for row in simulation.rows:
        text = Text()
        for each in (each for each in row if each.end > each.start):
            start, stop = (round(time * scale) for time in (each.start, each.end))
            text.append(_idle(text, start), "dim")
            name = _name(each.action, table)
            if each.action.kind not in LOOPED:
                name = name[: max(0, stop - start - 1)]
            block = name.ljust(stop - start - 1, "─") + " "
            text.append(block[: stop - start], _STYLES.get(each.action.kind, "magenta"))
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

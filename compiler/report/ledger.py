"""The ledger of communication: every collective of a program, with its bytes and its origin.

What one stage of a pipeline sends another is a collective of the kind `transfer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from meshwright.compiler.costs.prices import sent_bytes
from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import Graph, Node
from meshwright.compiler.graph.text import node_type_text, size_text
from meshwright.compiler.graph.transfers import (
    TransferKey,
    counted,
    moves,
    transfer_key,
)
from meshwright.compiler.program import Compiled
from meshwright.compiler.schedules.actions import Action, Link, Send
from meshwright.dsl.errors import plural
from meshwright.dsl.writing.html import html_table


@dataclass(frozen=True, slots=True)
class Moved:
    """One collective of a step, as one rank sees it.

    `phase` is `forward` or `backward`, `kind` torch's name (`all_reduce`), `axes` those of the
    mesh. `bytes` is what a rank sends under a bandwidth-optimal algorithm: 2(n-1)/n of an
    all-reduce's operand among n ranks, (n-1)/n of a reduce-scatter's, n-1 times an all-gather's. Of
    an `exchange_rows`, which sends as many rows as there are, it is the most that may be sent: the
    whole operand. A step runs it `times` times, once or in each microbatch. `value` is the node in
    the graph and `type` the type of its operand; of `operands` tensors that are sent together,
    their types.
    `module` is the path of the innermost module that it belongs to and `modules` those of all;
    `plan_line` are the places of the statements behind it, such as `gpt.plan:6`, and `instead` is
    what the next best choice would cost, for the operator that it is there for. In a pipeline,
    `at` are the coordinates of the ranks that send it, such as `pp=1`, and `stages` the stage that
    runs it and, of a transfer, the one that takes it.
    """

    phase: str
    kind: str
    axes: tuple[str, ...]
    bytes: int
    value: str
    type: str
    module: str
    modules: tuple[str, ...]
    plan_line: str
    instead: str
    times: int
    operands: int
    at: str
    stages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comm:
    """Every collective of a step, forward and backward: a sequence of `Moved`.

    `moved` is the tuple of them. Where ranks run different stages, figures are those of the rank
    that has most, and `by_place` has those of each.
    """

    moved: tuple[Moved, ...]

    def __repr__(self) -> str:
        most = "at most " if any(item.kind == "exchange_rows" for item in self) else ""
        size = f"{most}{size_text(self.total_bytes())}"
        return f"<Comm: {plural(self.times(), 'collective')}, {size} sent per rank per step>"

    def _repr_html_(self) -> str:
        groups: dict[tuple[str, str], list[Moved]] = {}
        for item in self.moved:
            key = item.phase, f"{item.kind}[{', '.join(item.axes)}]"
            groups.setdefault(key, []).append(item)
        groups["in all", ""] = list(self.moved)
        rows = [
            (*key, str(own.times()), size_text(own.total_bytes()))
            for key, found in groups.items()
            for own in [Comm(tuple(found))]
        ]
        columns = ("", "collective", "per step", "sent per rank")
        return html_table(columns, rows, right="  rr")

    def __iter__(self) -> Iterator[Moved]:
        return iter(self.moved)

    def __len__(self) -> int:
        return len(self.moved)

    def by_place(self) -> dict[str, Comm]:
        """The collectives of ranks by their coordinates along a pipeline: `{"pp=0": ...}`; one
        entry without a name where all ranks do the same."""
        found: dict[str, list[Moved]] = {}
        for item in self.moved:
            found.setdefault(item.at, []).append(item)
        return {place: Comm(tuple(items)) for place, items in found.items()}

    def bytes_by_axis(self) -> dict[str, int]:
        """Bytes that one rank sends in a step, by axis; `dp, tp` for collectives over both."""
        return self._most(lambda item: ", ".join(item.axes), lambda item: item.bytes * item.times)

    def counts(self) -> dict[str, int]:
        """How many collectives a step has, by kind and axes: `{"all_reduce[tp]": 8}`."""
        return self._most(
            lambda item: f"{item.kind}[{', '.join(item.axes)}]", lambda item: item.times
        )

    def _most(self, key: Callable[[Moved], str], number: Callable[[Moved], int]) -> dict[str, int]:
        """The sums of numbers by key, each of the rank that has most."""
        found: Counter[str] = Counter()
        for own in self.by_place().values():
            sums: Counter[str] = Counter()
            for item in own:
                sums[key(item)] += number(item)
            found |= sums
        return dict(sorted(found.items()))

    def where(self, test: Callable[[Moved], bool]) -> Comm:
        """The collectives for which `test`, a function of a `Moved`, is true."""
        return Comm(tuple(item for item in self.moved if test(item)))

    def under(self, module: str) -> Comm:
        """The collectives of `module`, such as `blocks.0`, and of the modules inside it."""
        return self.where(lambda item: module in item.modules)

    def times(self) -> int:
        """How many collectives run in a step: one of a microbatch runs in each."""
        return self.most(lambda item: item.times)

    def total_bytes(self) -> int:
        """Bytes that one rank sends in a step."""
        return self.most(lambda item: item.bytes * item.times)

    def most(self, number: Callable[[Moved], int]) -> int:
        """The sum of a `number` of each collective, a function of a `Moved`, of the rank where it
        is largest."""
        return max((sum(map(number, own)) for own in self.by_place().values()), default=0)

    def to_json(self) -> list[dict[str, object]]:
        """One plain dictionary per collective."""
        return [asdict(item) for item in self.moved]


def ledger(program: Compiled) -> Comm:
    """Every collective of a step; a transfer that two nodes share counts once."""
    return Comm(tuple(item for _, item in collectives(program)))


def collectives(program: Compiled) -> Iterator[tuple[Node, Moved]]:
    """Every collective of a step with its node, which for what a stage is sent is the input that
    takes it."""
    places: dict[str, int] = {}
    for rank in range(program.mesh.num_ranks):
        places.setdefault(program.place(rank), rank)
    for place, rank in places.items():
        entries = program.entries[rank]
        runs = Counter((each.stage, each.kind) for each in entries if isinstance(each, Action))
        sends = Counter(each.link for each in entries if isinstance(each, Send))
        for stage in program.stages:
            for phase, graph in stage.graphs.items():
                half = "backward" if phase.backward and program.trains else "forward"
                each = _Ledger(program, graph, half, place)
                if times := runs[stage.number, phase]:
                    yield from each.collectives(stage.number, times)
                for link, times in sends.items():
                    if (link.source, link.source_phase) == (stage.number, phase):
                        yield from each.transfers(link, times)


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What ranks at one place send in and after one graph."""

    program: Compiled
    graph: Graph
    half: str
    place: str

    def collectives(self, stage: int, times: int) -> Iterator[tuple[Node, Moved]]:
        shared: set[TransferKey] = set()
        for node in self.graph.nodes:
            if not moves(node) or self.graph.mesh.sequential.issuperset(node.kwargs["axes"]):
                continue
            if (key := transfer_key(node)) not in shared:
                shared.add(key)
                kind, axes = counted(node), node.kwargs["axes"]
                size = sent_bytes(node, self.graph.mesh)
                yield node, self._moved(node, node.args, kind, axes, size, times, (stage,))

    def transfers(self, link: Link, times: int) -> Iterator[tuple[Node, Moved]]:
        for node in self.program.transfers.values[link]:
            axes, size = self.program.pipeline, node_bytes(node, self.graph)
            ends = (link.source, link.target)
            yield node, self._moved(node, (node,), "transfer", axes, size, times, ends)

    def _moved(
        self,
        node: Node,
        operands: Sequence[Node],
        kind: str,
        axes: tuple[str, ...],
        size: int,
        times: int,
        stages: tuple[int, ...],
    ) -> Moved:
        return Moved(
            self.half,
            kind,
            axes,
            size,
            node.name,
            ", ".join(node_type_text(each, self.graph) for each in operands),
            node.origin.module,
            tuple(path for path, _ in node.origin.modules),
            node.origin.plan_line,
            node.origin.instead,
            times,
            len(operands),
            self.place,
            stages,
        )

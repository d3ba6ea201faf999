"""The ledger of communication: every collective of a program, with its bytes and its origin."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

from meshwright.compiler.graph.ir import Graph, Node, Phase
from meshwright.compiler.graph.text import node_type_text, size_text
from meshwright.compiler.graph.transfers import (
    TransferKey,
    counted,
    moves,
    transfer_key,
    transfers_of,
)
from meshwright.compiler.layout.wires import bytes_sent
from meshwright.dsl.errors import plural
from meshwright.dsl.writing.html import html_table


@dataclass(frozen=True, slots=True)
class Moved:
    """One collective of a step, as one rank sees it.

    `phase` is `forward` or `backward`, `kind` torch's name (`all_reduce`), `axes` those of the
    mesh. `bytes` is what a rank sends under a bandwidth-optimal algorithm: 2(n-1)/n of an
    all-reduce's operand among n ranks, (n-1)/n of a reduce-scatter's, n-1 times an all-gather's;
    a step runs it `times` times, once or in each microbatch. `value` is the node in the graph and
    `type` the type of its operand; of `operands` tensors that are sent together, their types.
    `module` is the path of the innermost module that it belongs to and `modules` those of all;
    `plan_line` are the places of the statements behind it, such as `gpt.plan:6`.
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
    times: int
    operands: int


@dataclass(frozen=True, slots=True)
class Comm:
    """Every collective of a step, forward and backward: a sequence of `Moved`.

    `moved` is the tuple of them.
    """

    moved: tuple[Moved, ...]

    def __repr__(self) -> str:
        size = size_text(self.total_bytes())
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

    def bytes_by_axis(self) -> dict[str, int]:
        """Bytes that one rank sends in a step, by axis; `dp, tp` for collectives over both."""
        total: Counter[str] = Counter()
        for item in self.moved:
            total[", ".join(item.axes)] += item.bytes * item.times
        return dict(sorted(total.items()))

    def counts(self) -> dict[str, int]:
        """How many collectives a step has, by kind and axes: `{"all_reduce[tp]": 8}`."""
        found: Counter[str] = Counter()
        for item in self.moved:
            found[f"{item.kind}[{', '.join(item.axes)}]"] += item.times
        return dict(sorted(found.items()))

    def where(self, test: Callable[[Moved], bool]) -> Comm:
        """The collectives for which `test`, a function of a `Moved`, is true."""
        return Comm(tuple(item for item in self.moved if test(item)))

    def under(self, module: str) -> Comm:
        """The collectives of `module`, such as `blocks.0`, and of the modules inside it."""
        return self.where(lambda item: module in item.modules)

    def times(self) -> int:
        """How many collectives run in a step: one of a microbatch runs in each."""
        return sum(item.times for item in self.moved)

    def total_bytes(self) -> int:
        """Bytes that one rank sends in a step."""
        return sum(item.bytes * item.times for item in self.moved)

    def to_json(self) -> list[dict[str, object]]:
        """One plain dictionary per collective."""
        return [asdict(item) for item in self.moved]


_BACKWARD = (Phase.BACKWARD, Phase.WEIGHT, Phase.AFTER)


def ledger(graphs: Iterable[Graph]) -> Comm:
    """Every collective of the graphs of one step; a transfer that two nodes share counts once."""
    return Comm(tuple(collectives(graphs).values()))


def collectives(graphs: Iterable[Graph]) -> dict[Node, Moved]:
    """Every collective of the graphs of one step, by node; a transfer that two nodes share counts
    once."""
    found: dict[Node, Moved] = {}
    for graph in graphs:
        shared: set[TransferKey] = set()
        for node in graph.nodes:
            if not moves(node) or graph.mesh.sequential.issuperset(node.kwargs["axes"]):
                continue
            if (key := transfer_key(node)) not in shared:
                shared.add(key)
                found[node] = _moved(node, graph)
    return found


def _numel(node: Node, graph: Graph) -> int:
    return math.prod(node.placed.local_shape(graph.mesh))


def _moved(node: Node, graph: Graph) -> Moved:
    wires = [each.wire for each in transfers_of(node, graph.mesh)]
    size = sum(
        bytes_sent(wire, _numel(source, graph), source.tensor.dtype.itemsize, graph.mesh)
        for source, wire in zip(node.args, wires, strict=True)
        if wire is not None
    )
    return Moved(
        "backward" if node.phase in _BACKWARD else "forward",
        counted(node),
        node.kwargs["axes"],
        size,
        node.name,
        ", ".join(node_type_text(source, graph) for source in node.args),
        node.origin.module,
        tuple(path for path, _ in node.origin.modules),
        node.origin.plan_line,
        1 if node.phase.once else len(graph.mesh.turns),
        len(node.args),
    )

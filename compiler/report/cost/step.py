"""The time of a step on a cluster: graphs by the walk of their instructions, and a pipeline by the
simulation of its schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from meshwright.compiler.costs.cluster import Cluster, ClusterError
from meshwright.compiler.costs.prices import Prices
from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.graph.text import size_text
from meshwright.compiler.program import Compiled
from meshwright.compiler.report.assumed import Assumed, operations
from meshwright.compiler.report.cost.clock import GraphTime, graph_time
from meshwright.compiler.report.memory.holding import Memory
from meshwright.compiler.report.memory.prediction import memories
from meshwright.compiler.report.recompute import flops_text
from meshwright.compiler.report.sheet import Column, Sheet
from meshwright.compiler.schedules.simulate import Costs, Simulation, Simulator

_BUSY = ("computing", "waiting")


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a step takes on a `cluster`, by a model: seconds of the rank that takes longest.

    `seconds` is the whole. Of these the rank computes for `computing`, waits for messages for
    `waiting`, has nothing to do in the pipeline for `idle`, waits at the end of the step for
    gradients for `tail`, and updates parameters for `update`. `sending` is how long its links carry
    messages, by axes, part of it beside what is computed. `graphs` has one run of each graph.
    `flops` is what the rank computes, and `peak` the bytes that it holds at most, of `memory`
    available. `convention` says how much collectives send: `pipelined`, `ring` or `tree`.
    """

    cluster: str
    convention: str
    seconds: float
    computing: float
    waiting: float
    idle: float
    tail: float
    update: float
    sending: Mapping[str, float]
    graphs: Mapping[str, GraphTime]
    flops: int
    peak: int
    memory: float

    @property
    def fits(self) -> bool:
        """True if a device has as much memory as the rank needs."""
        return self.peak <= self.memory

    @property
    def flops_per_second(self) -> float:
        """The floating-point operations per second of one device, over the whole step."""
        return self.flops / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        from meshwright.compiler.report.tables import sheet_text  # takes rich, which few runs need

        lines = [
            f"step: {seconds_text(self.seconds)} on {self.cluster}, collectives {self.convention}",
            sheet_text(self._parts()),
            "one run of each graph",
            sheet_text(self._by_graph()),
            self._use(),
        ]
        return "\n\n".join(lines)

    def __repr__(self) -> str:
        return f"<StepTime: {seconds_text(self.seconds)} on {self.cluster}>"

    def to_json(self) -> dict[str, object]:
        """The same as plain dictionaries and lists."""
        found = {**asdict(self), "fits": self.fits, "flops_per_second": self.flops_per_second}
        return {**found, "graphs": {name: asdict(each) for name, each in self.graphs.items()}}

    def _use(self) -> str:
        fits = "of" if self.fits else "which is more than its"
        return (
            f"{flops_text(round(self.flops_per_second))}/s per device; at most "
            f"{size_text(self.peak)} per rank, {fits} {size_text(int(self.memory))}"
        )

    def _parts(self) -> Sheet:
        names = (*_BUSY, "idle", "tail", "update")
        says = (
            "operators",
            "for collectives, with nothing to compute",
            "in the pipeline",
            "for gradients, at the end",
            "of the parameters",
        )
        parts = zip(names, says, [getattr(self, name) for name in names], strict=True)
        rows = [(name, seconds_text(time), self._share(time), what) for name, what, time in parts]
        rows += [
            (f"[{axes}]", seconds_text(time), self._share(time), "on the link, hidden or not")
            for axes, time in self.sending.items()
        ]
        columns = (Column(""), Column("", right=True), Column("", right=True), Column(""))
        return Sheet("", columns, tuple(row for row in rows if row[1] != "0 s"))

    def _share(self, seconds: float) -> str:
        return f"{seconds / self.seconds:.0%}" if self.seconds else ""

    def _by_graph(self) -> Sheet:
        heads = ("", "seconds", "computing", "waiting", "left under way")
        rows = tuple(
            (name, *map(seconds_text, (each.seconds, each.computing, each.waiting, each.left)))
            for name, each in self.graphs.items()
            if each.seconds
        )
        return Sheet("", tuple(Column(head, right=bool(head)) for head in heads), rows)


def _difference(whole: float, part: float) -> float:
    """What is left of a sum, which is not exactly 0 where nothing is."""
    left = whole - part
    return left if left > 1e-9 * whole else 0.0


def seconds_text(seconds: float) -> str:
    """`1.5 s`, `20 ms`, `3.25 us`."""
    if not seconds:
        return "0 s"
    units = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
    unit, size = next((each for each in units if seconds >= 0.9995 * each[1]), units[-1])
    return f"{seconds / size:.3g} {unit}"


def step_time(program: Compiled, cluster: Cluster, convention: str = "pipelined") -> StepTime:
    """The time of a step of `program`. Raises `ClusterError` for a cluster that lacks what the
    program needs."""
    if cluster.device != program.device.type:
        raise ClusterError(
            f"the program is compiled for {program.device.type}, and `{cluster.name}` has "
            f"{cluster.device}",
            help=f'compile with `device="{cluster.device}"`, or name another cluster',
        )
    return _Step(program, cluster, convention).time()


def modelled_costs(program: Compiled, cluster: Cluster, convention: str = "pipelined") -> Assumed:
    """What the actions of the program's schedule cost on a cluster."""
    return _Step(program, cluster, convention).assumed


@dataclass(frozen=True)
class _Step:
    program: Compiled
    cluster: Cluster
    convention: str

    @cached_property
    def prices(self) -> Prices:
        return Prices(self.cluster, self.program.stages[0].forward.mesh, self.convention)

    @cached_property
    def graphs(self) -> dict[str, GraphTime]:
        """One run of each graph, by name."""
        return {each.name: graph_time(each, self.prices) for each in self.program.instructions}

    @cached_property
    def assumed(self) -> Assumed:
        costs = Costs.of_phases(
            {
                phase: [self._seconds(stage, phase) for stage in range(len(self.program.stages))]
                for phase in Phase
            }
        )
        source = f"modelled on {self.cluster.name}, collectives {self.convention}"
        return Assumed(replace(costs, hop=self._hop()), source, "seconds")

    def _seconds(self, stage: int, phase: Phase) -> float:
        found = self._graph(stage, phase)
        return found.seconds if found else 0.0

    def _graph(self, stage: int, phase: Phase) -> GraphTime | None:
        graph = self.program.stages[stage].graphs.get(phase)
        return self.graphs[graph.name] if graph else None

    def _hop(self) -> float:
        """The longest time from a send of one stage to its arrival in another."""
        program, holders = self.program, self.program.table.holders
        sizes = [
            sum(node_bytes(node, program.stages[link.target].forward) for node in nodes)
            for link, nodes in program.transfers.values.items()
            if holders[link.source] != holders[link.target]
        ]
        return self.prices.link(program.pipeline).seconds(max(sizes)) if sizes else 0.0

    def time(self) -> StepTime:
        """All figures, of the rank along the pipeline that computes and waits longest."""
        program = self.program
        simulation = Simulator(program.table, program.transfers.values).run(self.assumed.costs)
        row = max(range(len(simulation.rows)), key=simulation.busy.__getitem__)
        ran = [each.action for each in simulation.rows[row]]
        runs = [time for each in ran if (time := self._graph(each.stage, each.kind))]
        computing, waiting = (sum(getattr(r, name) for r in runs) for name in _BUSY)
        memory = max(memories(program).values(), key=lambda each: each.peak)
        tail, update = self._tail(simulation), self._update(memory)
        sending = {axes: 0.0 for each in runs for axes in each.sending}
        for axes in sending:
            sending[axes] = sum(each.sending.get(axes, 0.0) for each in runs)
        return StepTime(
            self.cluster.name,
            self.convention,
            simulation.makespan + tail + update,
            computing,
            waiting,
            _difference(simulation.makespan, computing + waiting),
            tail,
            update,
            dict(sorted(sending.items())),
            self.graphs,
            sum(operations(program.stages[each.stage], each.kind) for each in ran),
            memory.peak,
            self.cluster.memory,
        )

    def _tail(self, simulation: Simulation) -> float:
        """How long the last reduction of gradients takes after the last action has ended."""
        return max((end for end in self._left(simulation)), default=0.0)

    def _left(self, simulation: Simulation) -> Iterator[float]:
        for row in simulation.rows:
            for each in row:
                graph = self._graph(each.action.stage, each.action.kind)
                if graph is not None:
                    yield each.end + graph.left - simulation.makespan

    def _update(self, memory: Memory) -> float:
        """Reading parameters, gradients and what the optimizer keeps, and writing all but the
        gradients."""
        if not self.program.trains:
            return 0.0
        size = 2 * memory.parameters + memory.gradients + 2 * memory.optimizer
        return size / self.cluster.bandwidth

"""The check of a whole schedule against the graphs of its stages, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import RETURNED, OutputKind
from meshwright.compiler.schedules.faults import find_fault
from meshwright.compiler.schedules.links import graphs_of, links_of
from meshwright.compiler.schedules.tables import Table
from meshwright.compiler.stages import PASSED_AS, Stage


def check_schedule(stages: Sequence[Stage], table: Table) -> None:
    """Check that ranks which run `table` compute what the stages say, and that none waits for ever.

    Every graph runs once for each of its microbatches, after what it takes has been made, sent and
    received; and no two give the same gradient, which would not be added up. Raises `PassError`.
    """
    links = links_of(stages)
    if fault := find_fault(table, graphs_of(stages), links, sends=True):
        raise _refused(str(fault))
    given = {value for values in links.values() for value in values}
    made: set[tuple[OutputKind, str]] = set()
    for stage in stages:
        for phase in stage.graphs:
            for node in stage.received(phase):
                if tuple(node.args) not in given:
                    raise _refused(f"stage {stage.number} takes `{node.args[1]}`, which none sends")
        for result in _results(stage):
            if result in made:
                kind, name = result
                raise _refused(f"stage {stage.number} makes the {kind} `{name}` once more")
            made.add(result)


def _refused(problem: str) -> PassError:
    return PassError(problem, help="report this: it is a bug")


def _results(stage: Stage) -> Iterator[tuple[OutputKind, str]]:
    """What a stage alone gives: every stage gives the loss and the outputs."""
    inner = (OutputKind.SAVED, *RETURNED, *PASSED_AS)
    for graph in stage.graphs.values():
        yield from ((each.kind, each.name) for each in graph.outputs if each.kind not in inner)

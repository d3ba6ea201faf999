"""The check that every value which an action of a schedule takes has been made before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import SAVED, OutputKind
from meshwright.compiler.schedules.actions import Action, Entry, Schedule, Send
from meshwright.compiler.schedules.pipeline import links_of
from meshwright.compiler.stages import PASSED_AS, Stage


def check_schedule(stages: Sequence[Stage], schedule: Schedule) -> None:
    """Check that each action has a graph, takes what its rank has made or begun to receive before,
    and makes nothing again: losses and gradients of multiple microbatches, or of two stages that
    share a parameter, are not added up. Raises `PassError`."""
    numbered, links = {stage.number: stage for stage in stages}, links_of(stages)
    for entries in dict.fromkeys(schedule.values()):
        made: set[object] = set()
        turns = range(1 + max((entry.microbatch for entry in entries), default=0))
        for action in entries:
            if not isinstance(action, Action):
                moved = {(*value, action.microbatch) for value in links.get(action.link, ())}
                if not moved:
                    raise _misplaced(action, "moves nothing")
                if isinstance(action, Send) and not moved <= made:
                    raise _misplaced(action, "comes before what it sends is made")
                made |= moved
                continue
            stage = numbered[action.stage]
            if action.kind not in stage.graphs:
                raise _misplaced(action, "has no graph")
            for kind, *value in _taken(stage, action):
                if (kind, *value) not in made:
                    raise _misplaced(action, f"takes {kind} `{value[0]}` before it is made")
            for kind, *value in _made(stage, action, turns):
                if (kind, *value) in made:
                    raise _misplaced(action, f"makes {kind} `{value[0]}` once more")
                made.add((kind, *value))


def _misplaced(action: Entry, what: str) -> PassError:
    return PassError(f"`{action}` in the schedule {what}", help="report this: it is a bug")


def _taken(stage: Stage, action: Action) -> Iterator[tuple[Any, ...]]:
    """The values of other actions that an action takes: kind, name, microbatch and, if saved,
    stage."""
    for node in stage.received(action.kind):
        yield *node.args, action.microbatch
    for node in stage.graphs[action.kind].nodes:
        if node.op == SAVED:
            yield OutputKind.SAVED, str(node.args[0]), action.microbatch, stage.number


def _made(stage: Stage, action: Action, turns: Iterable[int]) -> Iterator[tuple[Any, ...]]:
    """The values that an action makes, in the same terms; results of a step have no microbatch."""
    for output in stage.sent(action.kind):
        yield PASSED_AS[output.kind], output.name, action.microbatch
    for output in stage.graphs[action.kind].outputs:
        if output.kind is OutputKind.SAVED:
            for microbatch in turns if action.kind.once else (action.microbatch,):
                yield output.kind, output.name, microbatch, stage.number
        elif output.kind in (OutputKind.LOSS, OutputKind.OUTPUT):
            yield output.kind, output.name, stage.number  # which every stage gives
        elif output.kind not in PASSED_AS:
            yield output.kind, output.name

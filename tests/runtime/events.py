"""What each rank of this process does in a step, in order."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import pytest
from torch import Tensor

import meshwright as mw
from meshwright.compiler.layout.wires import Start, Wait
from meshwright.compiler.schedules.actions import Action
from meshwright.compiler.schedules.routes import LOOPED

Event = tuple[str, Any]
"""`act` and the action, or `start` or `wait` and the wire."""


def events_of(run: mw.Run, batch: Sequence[Tensor]) -> list[list[Event]]:
    """The events of the next step, by rank of this process."""
    executors = [executor for executor, _ in run._programs.launched.ranks]
    found: list[list[Event]] = [[] for _ in executors]
    with pytest.MonkeyPatch.context() as patched:
        for executor, events in zip(executors, found, strict=True):
            patched.setattr(executor, "act", partial(_noted, events, executor.act))
            patched.setattr(executor, "run", partial(_recorded, events, executor.run))
        run.step(*batch)
    return found


def _noted(events: list[Event], act: Any, action: Action, step: Any) -> Generator[Any, Any, Any]:
    events.append(("act", action))
    return (yield from act(action, step))


def _recorded(events: list[Event], begin: Any, arguments: Any) -> Generator[Any, Any, Any]:
    """The same step; each collective that starts is noted, and each that is awaited."""
    under_way: dict[int, Any] = {}
    program = begin(arguments)
    request = next(program)
    while True:
        if isinstance(request, Wait):
            events.append(("wait", under_way.pop(id(request.handle))[1]))
        else:
            events.append(("start", request[0] if type(request) is tuple else request.wire))
        answer = yield request
        if isinstance(request, Start):
            under_way[id(answer)] = (answer, request.wire)
        elif type(request) is tuple:
            events.append(("wait", request[0]))
        try:
            request = program.send(answer)
        except StopIteration as stop:
            return stop.value


def actions_during(events: Sequence[Event]) -> list[tuple[Action, Any, list[Action]]]:
    """Each collective that starts: the action that began last by then, its wire, and the actions of
    the loop that begin before it is awaited. Fails for one that is never awaited."""
    found = []
    last = None
    for place, (what, each) in enumerate(events):
        if what == "act":
            last = each
        elif what == "start":
            end = events.index(("wait", each), place)
            between = (e for kind, e in events[place:end] if kind == "act" and e.kind in LOOPED)
            found.append((last, each, list(between)))
    return found

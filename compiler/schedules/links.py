"""The graphs of stages, and the values that go from one to another."""

from __future__ import annotations

from collections.abc import Iterable

from meshwright.compiler.graph.ir import InputKind, Phase
from meshwright.compiler.schedules.actions import Link
from meshwright.compiler.stages import PASSED_AS, Stage

Taken = tuple[InputKind, str]
"""What a value is to the stage that takes it, and its name."""


def graphs_of(stages: Iterable[Stage]) -> frozenset[tuple[int, Phase]]:
    """The stages and phases of which there is a graph."""
    return frozenset((stage.number, phase) for stage in stages for phase in stage.graphs)


def links_of(stages: Iterable[Stage]) -> dict[Link, tuple[Taken, ...]]:
    """The links between stages, and the values that go along each, in the order in which they are
    returned."""
    stages = list(stages)
    takers: dict[Taken, list[tuple[int, Phase]]] = {}
    for stage in stages:
        for phase in stage.graphs:
            for node in stage.received(phase):
                takers.setdefault(tuple(node.args), []).append((stage.number, phase))
    found: dict[Link, list[Taken]] = {}
    for stage in stages:
        for phase in stage.graphs:
            for output in stage.sent(phase):
                passed = PASSED_AS[output.kind], output.name
                for taker in takers.get(passed, ()):
                    found.setdefault(Link(stage.number, phase, *taker), []).append(passed)
    return {link: tuple(values) for link, values in found.items()}

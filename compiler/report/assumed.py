"""What the actions of a schedule are assumed to cost: alike, given, measured or counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshwright.compiler.errors import CompilerError
from meshwright.compiler.graph.flops import flops
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.routes import LOOPED
from meshwright.compiler.schedules.simulate import Costs
from meshwright.compiler.stages import Stage
from meshwright.dsl.errors import did_you_mean, plural, spelled

CostsGiven = Mapping[str, float | Sequence[float]]
"""Costs as users write them: by kind, one number for each stage or one for all."""
_LEAST = 1e-100
"""The smallest cost that is not 0, so that no sum or share of costs is beyond floats."""
_EXAMPLE = '`costs={"forward": 1, "backward": 1, "weight": [1, 2], "hop": 0.1}`'
_KINDS = {phase.value: phase for phase in (*LOOPED, *Phase)}


@dataclass(frozen=True, slots=True)
class Assumed:
    """What actions are assumed to cost, in which unit, and where that is known from.

    `unit` is `"seconds"`, `"FLOPs"`, or empty for costs in a unit of the user's.
    """

    costs: Costs
    source: str
    unit: str = ""

    @property
    def by_stage(self) -> bool:
        """True unless every action costs the same."""
        costs = self.costs
        each = (*costs.forward, *costs.backward, *costs.weight)
        return bool(costs.around) or len(set(each)) > 1

    def text(self, time: float) -> str:
        """A time as text."""
        if self.unit == "seconds":
            return f"{1000 * time:.3g} ms"
        if not self.unit:
            return f"{time:g}"
        prefixes = ["", "K", "M", "G", "T", "P"]
        while time >= 999.5 and len(prefixes) > 1:
            time /= 1000
            del prefixes[0]
        return f"{time:.3g} {prefixes[0]}FLOPs"


def equal_costs(num_stages: int) -> Assumed:
    """Every action costs one unit of time, and what is sent is there at once."""
    return Assumed(Costs.equal(num_stages), "1 for every action")


def measured_costs(costs: Costs) -> Assumed:
    """The seconds that actions took on this machine."""
    return Assumed(costs, "measured on this machine, without what ranks send", "seconds")


def counted_costs(stages: Sequence[Stage]) -> Assumed:
    """The floating-point operations of each graph, on one rank, for one microbatch."""
    by_phase = {phase: [operations(stage, phase) for stage in stages] for phase in Phase}
    source = "counted: products, attention and convolutions of one rank, without what ranks send"
    return Assumed(Costs.of_phases(by_phase), source, "FLOPs")


def operations(stage: Stage, phase: Phase) -> int:
    """The floating-point operations of one rank in one run of a graph; 0 where there is none."""
    graph = stage.graphs.get(phase)
    return sum(flops(node, graph.mesh) for node in graph.nodes) if graph else 0


def spread(assumed: Assumed, num_stages: int) -> Assumed:
    """The same model in as many stages, all of which cost the same.

    Of a backward that is one graph, half is for weights.
    """
    costs = assumed.costs
    before = len(costs.forward)
    if num_stages == before:
        return assumed
    backward, weight = sum(costs.backward), sum(costs.weight)
    if not weight:
        backward = weight = backward / 2

    def shared(total: float) -> list[float]:
        return [total / num_stages] * num_stages

    around = {phase: shared(sum(each)) for phase, each in costs.around.items()}
    kinds = (shared(sum(costs.forward)), shared(backward), shared(weight))
    source = f"{assumed.source}; of {plural(before, 'stage')}, spread evenly over {num_stages}"
    return replace(assumed, costs=Costs(*kinds, costs.hop, around), source=source)


def given_costs(given: CostsGiven, num_stages: int, base: Assumed | None = None) -> Assumed:
    """Costs that a user gave, and those of `base` where none is given.

    Raises `CompilerError` for costs that cannot be.
    """
    if not isinstance(given, Mapping):
        raise CompilerError(f"`costs` is {spelled(given)}", help=f"write {_EXAMPLE}")
    kinds = (*_KINDS, "hop")
    for kind in given:
        if kind not in kinds:
            raise CompilerError(
                f"`costs` has the unknown key {spelled(kind)}", help=did_you_mean(str(kind), kinds)
            )
    for phase in LOOPED:
        if base is None and phase.value not in given:
            raise CompilerError(f"`costs` is missing `{phase.value}`", help=f"write {_EXAMPLE}")
    found = {kind: _numbers(kind, value, num_stages) for kind, value in given.items()}
    known = base.costs if base else Costs.equal(num_stages)
    (hop, *_) = found.pop("hop", [known.hop])
    looped = {phase.value: found.pop(phase.value) for phase in LOOPED if phase.value in found}
    around = {**known.around, **{_KINDS[kind]: each for kind, each in found.items()}}
    costs = replace(known, **looped, hop=hop, around=around)
    if base is None:
        return Assumed(costs, "as given")
    return replace(base, costs=costs, source=f"{base.source}; {', '.join(given)}: as given")


def _numbers(kind: str, value: Any, num_stages: int) -> list[float]:
    """The costs of a kind by stage, or the one number of a hop."""
    many = isinstance(value, (list, tuple)) and kind != "hop"
    each: list[float] = list(value) if many else [value]
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
    return each * num_stages if len(each) == 1 else each


def _is_cost(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and (value == 0 or _LEAST <= value <= 1 / _LEAST)  # type: ignore[operator]

"""What a program of M6 holds and sends, from its graphs; nothing runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import meshwright as mw
from examples.m6.model import SHARED, Setting

LIMIT = "32GB"
"""The memory of a GPU."""
LIMIT_BYTES = 32e9
STAGES = {"pseudo": SHARED, "real": ""}
"""By stage of the recipe: what its plan has besides."""
OFFLOADED = ("activations blocks.*", "optimizer", "parameters")
"""What can be kept in host memory, from what moves the fewest bytes per step to what moves most."""


@dataclass(frozen=True)
class Figures:
    """Of one program: numbers of parameters, and bytes per GPU. `away` says how many layers have
    what the line `offload` names in host memory, and `sent` are the bytes of a step by kind of
    collective."""

    setting: Setting
    stage: str
    offload: str
    parameters: int
    in_experts: int
    held: int
    """The weights of one GPU in float32, wherever they are."""
    peak: int
    parts: Mapping[str, int]
    host: int
    away: int
    sent: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether a GPU has the memory."""
        return self.peak <= LIMIT_BYTES


def figures(setting: Setting, stage: str, offload: str) -> Figures:
    """Compile the program of a stage under this line of the plan, and look at it."""
    program = setting.compiled(STAGES[stage], offload)
    memory, sizes = program.memory(), sizes_of(program)
    sent: Counter[str] = Counter()
    for each in program.comm():
        sent[each.kind] += each.bytes * each.times
    stored = program.parameters.values()
    return Figures(
        *(setting, stage, offload),
        parameters=sum(sizes.values()),
        in_experts=sum(size for name, size in sizes.items() if ".experts." in name),
        held=sum(each.local_bytes(program.mesh) for each in stored),
        peak=memory.peak,
        parts=memory.parts,
        host=memory.host,
        away=len({layer(each.name) for each in stored if each.kept.update.away}),
        sent=sent,
    )


def sizes_of(program: mw.Program) -> dict[str, int]:
    """The numbers of elements of all parameters."""
    return {name: math.prod(each.type.shape) for name, each in program.parameters.items()}


def layer(name: str) -> str:
    """The block that has a parameter, or what stands for it outside of blocks."""
    return ".".join(name.split(".")[:2])


def least(setting: Setting, stage: str, say: Callable[[str], None]) -> Iterator[Figures]:
    """What does not fit, from no offloading on, then the least that does: of the first kind that
    fits if all layers are taken, as many layers as it takes."""
    for what in ("", *OFFLOADED):
        line = f"offload {what}" if what else ""
        say(f"{setting.name}, {stage}: {line or 'nothing offloaded'}")
        found = figures(setting, stage, line)
        if found.fits and line:
            say(f"{setting.name}, {stage}: the least of that")
            found = figures(setting, stage, f"{line} budget={LIMIT}")
        yield found
        if found.fits:
            return

"""Sums over a part of a model: what each rank holds of it, and sends for it in a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import nn

from meshwright.compiler.graph.ir import Node
from meshwright.compiler.graph.names import fold
from meshwright.compiler.program import Compiled, Stored
from meshwright.compiler.report.ledger import Moved, collectives
from meshwright.compiler.report.memory.prediction import walks_by_rank
from meshwright.compiler.report.memory.storages import Walk
from meshwright.compiler.report.shares import shares

_Alike: TypeAlias = tuple[str, str, tuple[str, ...], str]
"""The phase, kind, axes and line of the plan that collectives have in common."""


@dataclass(frozen=True, slots=True)
class Part:
    """Modules of a model and their sums: `count` equal ones, of class `kind`.

    `name` is their path or a selector that matches all of them. `num_parameters` counts numbers of
    the whole model. In bytes per rank: `parameters`, `buffers`, `gradients` and `optimizer`, as in
    `Memory`, and what is `saved` for the backward. In one step, `collectives` run inside, and each
    rank sends `sent` bytes for these and for the gradients. Where ranks run different stages, each
    figure is of the rank where it is largest. A tied parameter counts in each module that has it.
    """

    name: str
    kind: str
    count: int
    num_parameters: int
    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    saved: int
    collectives: int
    sent: int


@dataclass(frozen=True, slots=True)
class Sum:
    """Equal collectives of one part: `count` of them, for which each rank sends `bytes` per step.

    `kind`, `axes` and `plan_line` are those of `Moved`. `phase` is `forward`, `backward` or, for
    those that reduce gradients of all modules at once, `gradients`. Of what carries parameters or
    gradients of multiple modules, `bytes` is the share of the part's own.
    """

    phase: str
    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    plan_line: str


class Sums:
    """The sums of a program's modules, by path; the empty path is the whole model."""

    def __init__(self, program: Compiled) -> None:
        self.program = program
        self.moved = list(collectives(program))
        self.shares = shares(program)
        self.walks = walks_by_rank(program)
        away = {s.name for s in program.parameters.values() if s.kept.update.away}
        self.states = [
            {name: size for name, size in update.state.items() if name not in away}
            for update in program.updates.values()
        ]

    def of(self, path: str, kind: str) -> Part:
        """The sums of one module and all inside it."""
        own = list(self._stored(path))
        updated = [each for each in own if each.requires_grad and self.program.trains]
        trained = [each for each in updated if not each.kept.update.away]
        buffers = self.program.buffers
        gradients, sums = self._held(trained), self.sums(path)
        return Part(
            path,
            kind,
            1,
            sum(math.prod(each.type.shape) for each in own),
            self._held(each for each in own if not each.kept.value.away),
            self._held(buffers[name] for name in _under(path, buffers)),
            gradients,
            self._state([s.name for s in trained] if path else None),
            max(self._saved(walk, path) for walk in self.walks.values()),
            sum(each.count for each in sums if not path or each.phase != "gradients"),
            sum(each.bytes for each in sums),
        )

    def _held(self, tensors: Iterable[Stored]) -> int:
        """The bytes of these that a rank holds."""
        mesh, held = self.program.mesh, list(tensors)
        return max(
            sum(each.local_bytes(mesh) for each in held if each.held_by(mesh.coords(rank)))
            for rank in self.walks
        )

    def _state(self, names: Iterable[str] | None) -> int:
        """The bytes that AdamW keeps of these parameters on a rank's device; with None, in all."""
        sizes = (
            sum(own.values()) if names is None else sum(own.get(name, 0) for name in names)
            for own in self.states
        )
        return max(sizes, default=0)

    def _saved(self, walk: Walk, path: str) -> int:
        """The bytes that graphs save for later ones, of what a module computes."""
        return sum(
            size
            for node, size in walk.saved.items()
            if inside(path, (module for module, _ in node.origin.modules))
        )

    def children(self, path: str, module: nn.Module) -> tuple[Part, ...]:
        """The children of a module that hold or send anything, the largest first, equal ones once.

        The largest is the one that sends most, then the one that holds most.
        """
        found: dict[Part, list[str]] = {}
        names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_children()]
        for name, child in zip(names, module.children(), strict=False):
            part = self.of(name, type(child).__name__)
            if part.parameters or part.buffers or part.saved or part.sent:
                found.setdefault(replace(part, name=""), []).append(name)
        parts = [
            _times(part, selector, len(group))
            for part, equal in found.items()
            for selector, group in fold(equal, names).items()
        ]
        return tuple(sorted(parts, key=lambda part: (-part.sent, -part.parameters - part.saved)))

    def sums(self, path: str) -> tuple[Sum, ...]:
        """What the rank that sends most for a module and all inside it sends, equal collectives
        together."""
        groups: dict[str, dict[_Alike, list[tuple[int, float]]]] = {}
        names = {each.name for each in self._stored(path)}
        for node, item in self.moved:
            phase, share = self._share(node, item, path, names)
            if share:
                key = (phase, item.kind, item.axes, item.plan_line)
                sent = share * item.bytes * item.times
                groups.setdefault(item.at, {}).setdefault(key, []).append((item.times, sent))
        found = [
            tuple(
                Sum(*key[:3], sum(n for n, _ in own), round(sum(sent for _, sent in own)), key[3])
                for key, own in sorted(each.items(), key=_phase)
            )
            for each in groups.values()
        ]
        return max(found, key=lambda sums: sum(each.bytes for each in sums), default=())

    def _share(self, node: Node, item: Moved, path: str, names: set[str]) -> tuple[str, float]:
        """The phase of a collective, and which share of its bytes is the module's."""
        own = self.shares.get(node, {})
        alone = bool(own) and not any(item.modules) and item.phase == "backward"
        phase = "gradients" if alone else item.phase
        if inside(path, item.modules):
            return phase, 1.0
        return phase, sum(share for name, share in own.items() if name in names)

    def _stored(self, path: str) -> Iterator[Stored]:
        parameters, aliases = self.program.parameters, self.program.captured.aliases
        own = dict.fromkeys(
            aliases.get(name, name) for name in _under(path, {**parameters, **aliases})
        )
        yield from (parameters[name] for name in own if name in parameters)


def inside(path: str, modules: Iterable[str]) -> bool:
    """Whether one of `modules` is at `path` or inside it: one that only contains others is never
    among them."""
    return not path or any(f"{each}.".startswith(f"{path}.") for each in modules)


def _under(path: str, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if not path or name.startswith(f"{path}."))


def _phase(group: tuple[_Alike, object]) -> int:
    return ("forward", "backward", "gradients").index(group[0][0])


def _times(part: Part, name: str, count: int) -> Part:
    """The sums of `count` equal parts."""
    fields = ("num_parameters", "parameters", "buffers", "gradients", "optimizer", "saved")
    sums = {each: count * getattr(part, each) for each in (*fields, "collectives", "sent")}
    return replace(part, name=name, count=count, **sums)

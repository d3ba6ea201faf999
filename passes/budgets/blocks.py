"""Find the modules that a budget may make regions of: the repeated blocks of a model.

A block is a module that another one equals, operator by operator, and that holds something which
the backward could compute again. Of nested ones the outermost is taken. A module that blocks make
up little of is one itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

from meshwright.compiler.graph.aliasing import is_view, node_bytes
from meshwright.compiler.graph.ir import GETITEM, INPUT, Graph, Node, Phase
from meshwright.dsl.statements import Checkpoint
from meshwright.passes.separate import needs_of
from meshwright.passes.statements.checkpoint import calls_around
from meshwright.passes.statements.draft import Call, Checkpointed, Draft

_LEAST_SHARE = 0.2
"""The least share of what a module could compute again that its blocks must hold."""


@dataclass(frozen=True, slots=True)
class Run:
    """Equal modules that run one after another in a stage, each `times` in a microbatch."""

    stage: int
    modules: tuple[str, ...]
    form: Hashable
    """Equal for runs of equal modules."""
    times: int


def runs(draft: Draft, graphs: Sequence[Graph], roots: Sequence[str]) -> list[Run]:
    """The blocks inside `roots`, in the order in which they run, by the joint graph of each stage.
    Modules that a statement already makes regions of are left alone, and so are those around."""
    trees = [_Tree(draft, graph) for graph in graphs]
    stages = Counter(path for tree in trees for path in tree.nodes)
    alike = Counter(form for tree in trees for form in tree.forms.values())
    taken = {path for path, _ in draft.checkpoints}
    apart = {path for path, count in stages.items() if count > 1} | taken
    found: list[Run] = []
    for number, tree in enumerate(trees):
        repeated = {path for path in tree.held if alike[tree.forms[path]] > 1}
        inside = tree.blocks([path for path in roots if path not in taken], repeated, apart)
        blocks = sorted(dict.fromkeys(inside), key=tree.first.__getitem__)
        for (form, times), modules in groupby(blocks, tree.kind):
            found.append(Run(number, tuple(modules), form, times))
    return found


class _Tree:
    """The modules that run in a stage."""

    def __init__(self, draft: Draft, graph: Graph) -> None:
        self.nodes: dict[str, list[Node]] = {}
        self.calls: dict[str, dict[Call, None]] = {}
        self.inner: dict[str, dict[str, None]] = {}
        """By module: those that it calls."""
        self.depths: dict[int, dict[Call, None]] = {}
        self.first: dict[str, int] = {}
        for place, node in enumerate(graph.nodes):
            if node.phase is Phase.FORWARD and node.op != INPUT:
                self._add(place, node)
        self.forms = {path: self._form(path) for path in self.nodes}
        self.held = _held(draft, graph, list(self.depths.values()))
        """By module that holds any: the bytes that the backward can compute again."""

    def _add(self, place: int, node: Node) -> None:
        stack = calls_around(node)
        for depth, call in enumerate(stack):
            path = call[0]
            self.nodes.setdefault(path, []).append(node)
            self.calls.setdefault(path, {}).setdefault(call)
            self.inner.setdefault(path, {})
            self.first.setdefault(path, place)
            self.depths.setdefault(depth, {}).setdefault(call)
            if depth:
                self.inner[stack[depth - 1][0]].setdefault(path)

    def _form(self, path: str) -> Hashable:
        """What equal modules have in common."""
        return tuple(
            (node.origin.module[len(path) :], node.op, tuple(node.results))
            for node in self.nodes[path]
        )

    def kind(self, path: str) -> tuple[Hashable, int]:
        """The form of a module, and how often it runs."""
        return self.forms[path], len(self.calls[path])

    def blocks(
        self, roots: Collection[str], repeated: Collection[str], apart: Set[str]
    ) -> list[str]:
        """The blocks inside some modules, none of which has one of those `apart` in it."""
        found: list[str] = []
        for path in roots:
            if path not in self.nodes:
                continue
            whole = path in self.held and apart.isdisjoint([path, *self._inside(path)])
            if whole and path in repeated:
                found.append(path)
                continue
            inner = self.blocks([p for p in self.inner[path] if p != path], repeated, apart)
            share = sum(self.held[each] for each in inner)
            if whole and share < _LEAST_SHARE * self.held[path]:
                found.append(path)
            else:
                found += inner
        return found

    def _inside(self, path: str) -> Iterator[str]:
        for each in self.inner[path]:
            if each != path:
                yield each
                yield from self._inside(each)


def _held(draft: Draft, graph: Graph, calls: Sequence[Collection[Call]]) -> dict[str, int]:
    """By module: the bytes that it holds, alone as a region, of what the backward computes again;
    the calls are by depth."""
    found: Counter[str] = Counter()
    for own in calls:
        regions = {call: Checkpointed(call[0], Checkpoint()) for call in own}
        for again in needs_of(draft, graph, regions).again.values():
            for node, level in again:
                if level and node.op != GETITEM and not is_view(node.op):
                    found[level[-1].name] += node_bytes(node, graph)
    return dict(found)

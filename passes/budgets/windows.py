"""What a region saves, holds and computes again, by what of it is kept: on paper.

A window is the part of the backward from the first to the last node that takes something of the
region. Its nodes are gone through in their order, with what has to be computed again right before
each, and storages live from their first to their last use.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from meshwright.compiler.graph.aliasing import memory_of, node_bytes
from meshwright.compiler.graph.flops import flops
from meshwright.compiler.graph.ir import GETITEM, INPUT, Graph, MeshOp, Node, OutputKind, Phase
from meshwright.compiler.layout.mesh import Mesh
from meshwright.passes.budgets.rates import moving
from meshwright.passes.needs import Needs
from meshwright.passes.statements.checkpoint import keep_names, keep_words
from meshwright.passes.statements.draft import Checkpointed
from meshwright.passes.statements.offloading.amount import SMALL_BYTES

_ELSEWHERE = (MeshOp("bucket"), MeshOp("bucket_item"), INPUT)
"""Operators whose results lie in memory that outlives a step."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A region under one choice of what is kept: bytes `saved` for the backward, the `peak` of
    bytes while its own backward runs, these included, and what it computes again. Of what is saved,
    `large` bytes can be elsewhere meanwhile; both ways take `exposed` operations more than what the
    region computes."""

    saved: int
    peak: int
    cost: int
    large: int
    exposed: int


def operations(node: Node, mesh: Mesh) -> int:
    """The operations that a node takes: those of its products, or one for each element."""
    if node.op == GETITEM or memory_of(node) is not node:
        return 0
    _, layout = next(node.results)
    shape = () if layout is None else layout.local_shape(mesh)
    return flops(node, mesh) or math.prod(shape)


class Later:
    """The nodes of a stage that run after its forward, in order, and what they take of it."""

    def __init__(self, graph: Graph, needs: Needs, regions: Collection[Checkpointed]) -> None:
        self.graph, self.needs = graph, needs
        self.phases = needs.phases[needs.phases.index(Phase.FORWARD) + 1 :]
        self.nodes = [node for node in graph.nodes if needs.home[node] in self.phases]
        self.nodes.sort(key=lambda node: self.phases.index(needs.home[node]))
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.users = graph.users()
        gradients = {output.node for output in graph.outputs_of(OutputKind.GRADIENT)}
        self.outside = {
            node
            for node in self.nodes
            if node.op in _ELSEWHERE
            or node in gradients
            or (self.users[node] and all(u.op in _ELSEWHERE for u in self.users[node]))
        }
        self.always = {
            node
            for phase in self.phases
            for node, level in needs.again[phase]
            if level and level[-1] not in regions
        }
        """What is computed again whatever is chosen: what other regions hold."""
        self._sizes: dict[Node, int] = {}
        self._took: dict[Node, tuple[Node, ...]] = {}

    def is_earlier(self, node: Node) -> bool:
        """Whether a value is computed before."""
        return self.needs.home[node] not in self.phases

    def takes(self, node: Node) -> tuple[Node, ...]:
        """What a node takes, each once; what is taken again without a region, such as views of
        what is saved, stands for what it is made of."""
        if node not in self._took:
            found: dict[Node, None] = {}
            for operand in node.operands():
                found.update(dict.fromkeys(self._sources(operand)))
            self._took[node] = tuple(found)
        return self._took[node]

    def _sources(self, node: Node) -> Iterator[Node]:
        if node.held:
            return
        again = any((node, ()) in self.needs.again[phase] for phase in self.phases)
        if again and self.is_earlier(node):
            yield from self.takes(node)
        else:
            yield node

    def size(self, node: Node) -> int:
        """The bytes of the memory of a node."""
        if node not in self._sizes:
            elsewhere = node.held or node in self.outside or isinstance(node.type, tuple)
            apart = elsewhere or memory_of(node) is not node
            self._sizes[node] = 0 if apart else node_bytes(node, self.graph)
        return self._sizes[node]

    def cost(self, node: Node) -> int:
        """The operations that a node takes."""
        return operations(node, self.graph.mesh)

    def steps(self, nodes: Sequence[Node], again: Collection[Node]) -> list[Node]:
        """Some nodes, each after what is computed again for it."""
        found: list[Node] = []
        done: set[Node] = set()
        for node in nodes:
            chain = self._chain(node, again, done)
            done |= chain
            found += [*sorted(chain, key=self.order.__getitem__), node]
        return found

    def alive(
        self, nodes: Sequence[Node], again: Collection[Node], saved: Collection[Node] | None = None
    ) -> list[int]:
        """The bytes alive at each of the `steps` of some nodes, if the storages `saved` live until
        their last use, by default all. Others that are there before and after do not count."""
        steps = self.steps(nodes, again)
        own = set(steps)
        last: dict[Node, int] = {}
        for place, node in enumerate(steps):
            for taken in (*self.takes(node), node):
                last[memory_of(taken)] = place
        for node in nodes:
            if any(user not in own for user in self.users[node]) or not self.users[node]:
                last[memory_of(node)] = len(steps)
        ends: dict[int, int] = {}
        for memory, place in last.items():
            ends[place] = ends.get(place, 0) + self._counted(memory, own, saved)
        total = sum(self._counted(m, own, saved) for m in last if m not in own)
        found: list[int] = []
        for place, node in enumerate(steps):
            total += self.size(node)
            found.append(total)
            total -= ends.get(place, 0)
        return found

    def _counted(self, memory: Node, own: Collection[Node], saved: Collection[Node] | None) -> int:
        known = memory in own or not self.is_earlier(memory)
        counts = saved is None or memory in saved or known
        return self.size(memory) if counts else 0

    def _chain(self, node: Node, again: Collection[Node], done: set[Node]) -> set[Node]:
        """What has to be computed again before a node can run."""
        found: set[Node] = set()
        pending = [node]
        while pending:
            for taken in self.takes(pending.pop()):
                needed = taken in again or taken in self.always
                if needed and taken not in found and taken not in done:
                    found.add(taken)
                    pending.append(taken)
        return found


class Window:
    """The backward of one region.

    `groups` are the values that can be kept, by how `keep=` names them: an operator, or the
    operator of a module where the region has it in several.
    """

    def __init__(
        self,
        later: Later,
        region: Checkpointed,
        words: Collection[str],
        path: str | None = None,
    ) -> None:
        self.later, self.path = later, path
        needs = later.needs
        self.again = {
            node: None
            for phase in later.phases
            for node, level in needs.again[phase]
            if level and level[-1] is region
        }
        """What is computed again if nothing is kept, as the keys."""
        inside = {node for node, around in needs.regions.around.items() if region in around}
        places = [
            i for i, n in enumerate(later.nodes) if not self.again.keys().isdisjoint(later.takes(n))
        ]
        self.first, self.last = (places[0], places[-1] + 1) if places else (0, 0)
        self.nodes = later.nodes[self.first : self.last]
        self.forward = sum(map(later.cost, inside))
        self.backward = sum(map(later.cost, self.nodes))
        elsewhere = {
            memory_of(taken)
            for node in (*later.nodes[: self.first], *later.nodes[self.last :])
            for taken in later.takes(node)
        }
        taken = (t for n in (*self.nodes, *self.again) for t in later.takes(n))
        self.own = {
            memory: None
            for memory in map(memory_of, taken)
            if later.is_earlier(memory) and (memory in inside or memory not in elsewhere)
        }
        """The storages that count for this region if they are saved, as the keys."""
        self.groups = self._groups(region.name.split(", "), words)

    def _groups(self, modules: Sequence[str], words: Collection[str]) -> dict[str, set[Node]]:
        named: dict[str, dict[str, set[Node]]] = {}
        for node in self.again:
            maker = node.args[0] if node.op == GETITEM else node
            word = next((each for each in keep_words(maker) if each in words), "")
            if word and self.later.size(node):
                path = next((m for m in modules if within(maker.origin.module, m)), "")
                inner = maker.origin.module[len(path) :].strip(".")
                named.setdefault(word, {}).setdefault(inner, set()).update((maker, node))
        found: dict[str, set[Node]] = {}
        for word, by_module in sorted(named.items()):
            if len(by_module) == 1 or "" in by_module:
                found[word] = set().union(*by_module.values())
            else:
                found.update((f"{inner}.{word}", own) for inner, own in sorted(by_module.items()))
        return found

    def kept(self, names: Collection[str]) -> set[Node]:
        """The values that these words name after `keep=`, which may be those of groups."""
        return {
            node
            for node in self.again
            if any(keep_names(word, node.args[0] if node.op == GETITEM else node) for word in names)
        }

    def priced(self, names: Collection[str]) -> Priced:
        """The region, if the values of these groups are kept."""
        return self._priced(self.again.keys() - self.kept(names))

    def whole(self) -> Priced:
        """The region, if nothing is computed again."""
        return self._priced(set())

    def _priced(self, again: set[Node]) -> Priced:
        later = self.later
        made = set(later.steps(self.nodes, again)).difference(self.nodes)
        taken = {memory_of(t) for n in (*self.nodes, *made) for t in later.takes(n)}
        saved = (taken & self.own.keys()) - made
        sizes = [later.size(memory) for memory in saved]
        large = sum(size for size in sizes if size >= SMALL_BYTES)
        cost, moves = sum(map(later.cost, made)), moving(large, self.path)
        beside = (self.forward, self.backward + cost)
        return Priced(
            sum(sizes),
            max(later.alive(self.nodes, again, saved), default=0),
            cost,
            large,
            sum(max(moves - computed, 0) for computed in beside),
        )


def within(path: str, module: str) -> bool:
    return not module or path == module or path.startswith(f"{module}.")

"""Find what repeats in a graph: consecutive blocks that are equal but for names and numbers.

The lines of a graph, its nodes and then its outputs, are searched for runs of equal copies, such as
the layers of a transformer. Two lines are equal if operator, arguments, types, layouts and lines of
the plan are, and if their module paths differ in one index at most, by the same step in the whole
copy. Their operands are at the same place in both copies, or the same node outside them, or at
equal places of an earlier repetition, as many copies apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any, TypeAlias

from meshwright.compiler.graph.ir import INPUT, Arg, Graph, MeshOp, Node, Op, Output, OutputKind
from meshwright.compiler.graph.names import numbers, starred
from meshwright.compiler.placing.composite import composite_of

Line: TypeAlias = "Node | Output"
Folded: TypeAlias = "Line | Repeat | str"
"""A line, equal copies of lines, or a remark about the lines after it."""
Key: TypeAlias = tuple[Any, ...]


def node_of(line: Line) -> Node:
    """The node of a line."""
    return line if isinstance(line, Node) else line.node


LATER = "buckets of gradients, each as soon as its gradients are there"
"""The remark before buckets that are not printed where they run."""
_WORTH = 0.8
"""Buckets are printed last if that leaves less than this part of the lines."""
_MIN_SAVED = 4
"""The fewest lines that are worth a line that stands for them."""
_MAX_TRIED = 64
"""How many later lines with the key of a line are tried as the beginning of the next copy."""
_MAX_BEGINS = 4
"""How many beginnings of modules are tried as the beginning of a copy."""
_NUMBERED: dict[Op, int] = {MeshOp("saved"): 0, MeshOp("bucket_item"): 1}
"""The position of the argument that numbers an operator of the frame by its place in the graph."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """Equal copies of some lines, one after another.

    `first` is the first copy, itself folded; `others` are the rest, and `paths` the modules that
    they belong to, `blocks.1` and so on, or empty; their indices are `step` apart. `carried` has
    triples: a value from before the first copy that it takes, the value of the first copy that the
    second takes in its place, and the counterpart of that in the last copy.
    """

    first: tuple[Folded, ...]
    others: tuple[tuple[Line, ...], ...]
    paths: tuple[str, ...]
    step: int
    carried: tuple[tuple[Node, Node, Node], ...]


@dataclass(slots=True)
class _Copies:
    """A run of equal copies while it is found: `count` times `period` lines from `start` on."""

    start: int
    period: int
    count: int = 1
    learned: dict[object, object] = field(default_factory=dict)
    """What holds from copy to copy: for "", by how much the index in the module's path grows; for
    an operator, by how much its numbers grow; for an operand, where it comes from."""
    carried: dict[Node, Node] = field(default_factory=dict)

    @property
    def num_saved(self) -> int:
        return (self.count - 1) * self.period

    @property
    def step(self) -> int:
        """By how much the index in the module's path grows from copy to copy."""
        step = self.learned.get("", 0)
        assert isinstance(step, int)
        return step

    def learn(self, key: object, value: object) -> bool:
        """Whether this holds from copy to copy: the first two say what does."""
        if self.count == 1:
            return self.learned.setdefault(key, value) == value
        return self.learned.get(key) == value


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a node stands in an earlier repetition."""

    run: int
    copy: int
    offset: int
    step: int


class _Facts:
    """What is compared of a line: a key without names and numbers, and those."""

    __slots__ = ("key", "numbers", "operands", "path")

    def __init__(self, line: Line) -> None:
        node = node_of(line)
        self.numbers: tuple[tuple[str, int], ...] = ()
        if not isinstance(line, Node):
            kind, name = line.kind, line.name
            self.operands = [node]
            if kind is OutputKind.SAVED:
                self.numbers, name = (("return", int(name)),), node.origin.module
            self.path = name
            self.key: Key = (kind, starred(name), node.type, node.layout)
            return
        self.operands = list(node.operands())
        self.path = str(node.args[1]) if node.op == INPUT else node.origin.module
        args: tuple[Arg, ...] = node.args[:1] if node.op == INPUT else node.args
        known = composite_of(node.op)
        place = known.number if known else _NUMBERED.get(node.op)
        if place is not None and place < len(args) and isinstance(args[place], int):
            self.numbers = ((str(node.op), args[place]),)
            args = (*args[:place], "#", *args[place + 1 :])
        origin = node.origin
        where = (starred(self.path), tuple(kind for _, kind in origin.modules), origin.plan_line)
        literals = _literals((args, tuple(node.kwargs.items())))
        self.key = (node.op, literals, node.type, node.layout, node.requires_grad, where)


def _literals(arg: Arg) -> Arg:
    """An argument as a key: operands without their names, `1`, `1.0` and `True` apart."""
    if isinstance(arg, Node):
        return Node
    if isinstance(arg, (tuple, list)):
        return tuple(map(_literals, arg))
    return type(arg), str(arg) if isinstance(arg, float) else arg


def fold_lines(graph: Graph) -> tuple[Folded, ...]:
    """The lines of a graph, in order, with repetitions in place of equal copies.

    Buckets of gradients are closed when they are full, wherever that is in a layer. Where that
    would hide that layers are equal, they come after all other nodes, under `LATER`.
    """
    found = _fold(graph.nodes, (), graph.outputs)
    later = [node for node in graph.nodes if _in_bucket(node)]
    rest = [node for node in graph.nodes if not _in_bucket(node)]
    if not later or any(_in_bucket(operand) for node in rest for operand in node.operands()):
        return found
    apart = _fold(rest, later, graph.outputs)
    return apart if num_lines(apart) < _WORTH * num_lines(found) else found


def _fold(
    nodes: Sequence[Node], later: Sequence[Node], outputs: Sequence[Line]
) -> tuple[Folded, ...]:
    folder = _Folder((*nodes, *later, *outputs))
    if not later:
        return folder.fold(0, len(folder.lines))
    start, end = len(nodes), len(nodes) + len(later)
    parts = folder.fold(0, start), folder.fold(start, end), folder.fold(end, len(folder.lines))
    return (*parts[0], LATER, *parts[1], *parts[2])


def num_lines(lines: Sequence[Folded]) -> int:
    """How many lines print."""
    return sum(num_lines(line.first) + 1 if isinstance(line, Repeat) else 1 for line in lines)


def _in_bucket(node: Node) -> bool:
    """Whether a node puts gradients together, reduces them together, or takes one of them out."""
    ends = MeshOp("bucket"), MeshOp("bucket_item")
    return node.op in ends or any(operand.op == ends[0] for operand in node.operands())


class _Folder:
    """Searches the lines from the first to the last; what was found before helps to compare."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self.facts = [_Facts(line) for line in lines]
        known: dict[Key, int] = {}
        self.keys = [known.setdefault(facts.key, len(known)) for facts in self.facts]
        self.alike: list[list[int]] = [[] for _ in known]
        """By key: the lines that have it, in their order."""
        for i, key in enumerate(self.keys):
            self.alike[key].append(i)
        self.indices = [numbers(facts.path) for facts in self.facts]
        self.position = {line: i for i, line in enumerate(lines) if isinstance(line, Node)}
        self.places: dict[Node, list[_Place]] = {}
        self.num_runs = 0

    def fold(self, start: int, end: int) -> tuple[Folded, ...]:
        """The lines from `start` to before `end`, folded."""
        found: list[Folded] = []
        while start < end:
            best = self._best(start, end)
            if best is not None and best.num_saved >= _MIN_SAVED:
                best = self._aligned(best, end)
                found += [*self.lines[start : best.start], self._repeat(best)]
                start = best.start + best.period * best.count
            else:
                found.append(self.lines[start])
                start += 1
        return tuple(found)

    def _best(self, start: int, end: int) -> _Copies | None:
        return max(self._tried(start, end), key=lambda each: each.num_saved, default=None)

    def _aligned(self, run: _Copies, end: int) -> _Copies:
        """A run that saves no fewer lines and begins where a module does, else `run`."""
        lines = range(run.start, run.start + run.period)
        paths = [self._moved_path(i + run.period, i) for i in lines]
        begins = (i for i in range(1, len(paths)) if "" != paths[i - 1] != paths[i] != "")
        for i in islice(begins, _MAX_BEGINS):
            other = self._best(run.start + i, end)
            if other is not None and other.num_saved >= run.num_saved:
                return other
        return run

    def _repeat(self, run: _Copies) -> Repeat:
        self.num_runs += 1
        for copy in range(run.count):
            for offset in range(run.period):
                line = self.lines[run.start + copy * run.period + offset]
                if isinstance(line, Node):
                    place = _Place(self.num_runs, copy, offset, run.step)
                    self.places.setdefault(line, []).append(place)
        starts = [run.start + copy * run.period for copy in range(run.count)]
        first = self.fold(run.start, run.start + run.period)
        others = tuple(tuple(self.lines[start : start + run.period]) for start in starts[1:])
        last = {b: others[-1][self.position[b] - run.start] for b in run.carried.values()}
        carried = tuple((a, b, node_of(last[b])) for a, b in run.carried.items())
        return Repeat(first, others, tuple(self._paths(run, starts)), run.step, carried)

    def _paths(self, run: _Copies, starts: list[int]) -> Iterator[str]:
        """For each copy but the first, the module that most of its lines belong to."""
        for start in starts[1:]:
            found = Counter(
                self._moved_path(i - run.period, i) for i in range(start, start + run.period)
            )
            found.pop("", None)
            yield from (path for path, _ in found.most_common(1))

    def _moved_path(self, i: int, j: int) -> str:
        """The path of line `j` up to the index in which it differs from that of line `i`."""
        parts = self.facts[j].path.split(".")
        for at, (a, b) in enumerate(zip(self.facts[i].path.split("."), parts, strict=True)):
            if a != b:
                return ".".join(parts[: at + 1])
        return ""

    def _tried(self, start: int, end: int) -> Iterator[_Copies]:
        """The longest run of copies from `start` on, for each period that it might have."""
        same = self.alike[self.keys[start]]
        at = bisect_right(same, start)
        tried: set[tuple[bool, ...]] = set()
        for other in same[at : at + _MAX_TRIED]:
            pairs = zip(self.indices[start], self.indices[other], strict=True)
            moved = tuple(a != b for a, b in pairs)
            if sum(moved) > 1 or moved in tried:
                continue
            if start + 2 * (other - start) > end:
                return
            tried.add(moved)
            run = _Copies(start, other - start)
            while self._continues(run, end):
                run.count += 1
            yield run

    def _continues(self, run: _Copies, end: int) -> bool:
        """Whether the lines after a run are one more copy; the run learns what holds for them."""
        last = run.start + (run.count - 1) * run.period
        next = last + run.period
        if next + run.period > end:
            return False
        if self.keys[last:next] != self.keys[next : next + run.period]:
            return False
        return all(self._equal(i, run) for i in range(last, next))

    def _equal(self, i: int, run: _Copies) -> bool:
        """Whether line `i` of the last copy and its counterpart in the next differ as they may."""
        here, there = self.facts[i], self.facts[i + run.period]
        if not self._steps(i, i + run.period, run):
            return False
        for (kind, a), (_, b) in zip(here.numbers, there.numbers, strict=True):
            if not run.learn(kind, b - a):
                return False
        operands = enumerate(zip(here.operands, there.operands, strict=True))
        return all(self._same(a, b, i + run.period, at, run) for at, (a, b) in operands)

    def _steps(self, i: int, j: int, run: _Copies) -> bool:
        """Whether the indices of two lines differ in one at most, by the step of the run."""
        pairs = zip(self.indices[i], self.indices[j], strict=True)
        steps = [b - a for a, b in pairs if a != b]
        return not steps or (len(steps) == 1 and run.learn("", steps[0]))

    def _same(self, a: Node, b: Node, line: int, at: int, run: _Copies) -> bool:
        """Whether `b`, operand `at` of this line, is in its copy what `a` is in the copy before."""
        i, j = self.position.get(a, -1), self.position.get(b, -1)
        source: object = None
        if j >= run.start:
            # What the first copy takes from before it, the second takes from the first.
            begins = run.count == 1 and i < run.start and j < run.start + run.period
            taken = begins and run.carried.setdefault(a, b) is b
            source = line - j if taken or j - i == run.period else None
        elif a is b:
            source = "the same"
        elif a.op == INPUT and self.keys[i] == self.keys[j] and self._steps(i, j, run):
            source = "input"
        else:
            source = self._place(a, b, run)
        return source is not None and run.learn(((line - run.start) % run.period, at), source)

    def _place(self, a: Node, b: Node, run: _Copies) -> object:
        """The place that two nodes have in copies of an earlier repetition, if it is the same."""
        for x, y in product(self.places.get(a, ()), self.places.get(b, ())):
            if (x.run, x.offset) == (y.run, y.offset):
                apart = y.copy - x.copy
                if run.learn(("run", x.run), apart) and run.learn("", apart * x.step):
                    return x.run, x.offset
        return None

"""Cut the forward into the stages of a pipeline: each node is given the stage that computes it.

Before:  linear: f32[8, 64]   = linear(x, up_weight, up_bias)
         relu: f32[8, 64]     = relu(linear)
         linear_1: f32[8, 16] = linear(relu, down_weight, down_bias)
After:   linear: f32[8, 64]   = linear(x, up_weight, up_bias)
         relu: f32[8, 64]     = relu(linear)
         transfer: f32[8, 64] = transfer(relu, to stage 1)
         linear_1: f32[8, 16] = linear(transfer, down_weight, down_bias)

A stage begins with the first node of the module that the plan names: with `stages at down`, all
before `down` is of stage 0. From that follow the transfers, which `partition` makes. Where a value
belongs depends on what feeds it (`Source`): an activation is computed where it stands in the
forward. What only parameters feed is computed in the first stage that uses it, which owns those
parameters. What no parameter feeds has no stage of its own: each stage that uses it computes it.
Requires: a graph in the order in which the model runs. Ensures: no activation takes one of a later
stage.
Elsewhere: the stages of torch.distributed.pipelining, which are modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    RETURNED,
    Builder,
    Graph,
    InputKind,
    Node,
    Origin,
    OutputKind,
)
from meshwright.dsl.errors import either, plural
from meshwright.dsl.selectors import Selector
from meshwright.dsl.statements import Spread, Stages, Summa
from meshwright.dsl.suggest import nothing_matches, selectors_of
from meshwright.passes.statements.draft import Draft, with_graph
from meshwright.passes.statements.missing import runs
from meshwright.passes.statements.pins import module_text
from meshwright.passes.statements.targets import evaluated, modules_of

aten = torch.ops.aten


class Source(Enum):
    """What feeds a value."""

    FREE = "free"
    """No parameter."""
    WEIGHT = "weight"
    """A parameter, and no argument."""
    ACTIVATION = "activation"
    """A parameter and an argument."""


def sources(graph: Graph) -> dict[Node, Source]:
    """What feeds each node of a forward."""
    trained: set[Node] = set()
    given: set[Node] = set()
    for node in graph.nodes:
        if node.op == INPUT and node.args[0] == InputKind.PARAMETER:
            trained.add(node)
        elif node.op == INPUT and node.args[0] == InputKind.ARGUMENT:
            given.add(node)
        for found in (trained, given):
            if not found.isdisjoint(node.operands()):
                found.add(node)
    return {
        node: Source.FREE
        if node not in trained
        else Source.ACTIVATION
        if node in given
        else Source.WEIGHT
        for node in graph.nodes
    }


def stages(draft: Draft) -> Draft:
    """`draft` with a stage on the origin of each node, where the plan cuts the model."""
    statements = draft.plan.of(Stages)
    if not statements:
        return draft
    _check_alone(draft, statements[0])
    starts = _Boundaries(draft, statements[0]).starts()
    cut = _Cut(draft.graph, starts, draft.held)
    _check_written(draft, cut, statements[0])
    _check_held(draft, cut, statements[0])
    found = with_origins(draft, lambda node: replace(node.origin, stage=cut.stage[node]))
    return replace(found, num_stages=len(starts) + 1, holders=cut.holders())


def with_origins(draft: Draft, origin: Callable[[Node], Origin]) -> Draft:
    """`draft` with another origin for each node."""
    builder = Builder(draft.graph.name, draft.graph.mesh)
    mapping: dict[Node, Node] = {}
    for node in draft.graph.nodes:
        mapping[node] = builder.copy(node, mapping, origin=origin(node))
    graph = builder.graph(each.of(mapping[each.node]) for each in draft.graph.outputs)
    return with_graph(draft, graph, mapping, mapping)


@dataclass(slots=True)
class Beginning:
    """Where a module begins in a forward."""

    place: int
    """That of the first activation which it computes."""
    calls: set[tuple[int, ...]] = field(default_factory=set)
    """Its calls, each with the numbers of those of the modules around it."""


def beginnings(graph: Graph) -> dict[str, Beginning]:
    """Where each module begins that computes activations; of those that begin in one place, the
    outer ones first."""
    found: dict[str, Beginning] = {}
    of = sources(graph)
    for place, node in enumerate(graph.nodes):
        if of[node] is Source.ACTIVATION:
            for depth, (path, _) in enumerate(node.origin.modules, 1):
                begun = found.setdefault(path, Beginning(place))
                begun.calls.add(node.origin.calls[:depth])
    return found


class _Cut:
    """The stage of each node of a forward, of which the stages after the first begin at `starts`:
    places among its nodes."""

    def __init__(
        self, graph: Graph, starts: Sequence[int], held: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.graph, self.last, self.held = graph, len(starts), held
        self.users, self.sources = graph.users(), sources(graph)
        self.returned = {each.node for each in graph.outputs_of(*RETURNED)}
        """What all stages return; the last gives it to the others."""
        self.stage = {
            node: sum(start <= place for start in starts) for place, node in enumerate(graph.nodes)
        }
        self._cast_early()
        self._own()
        for node in graph.nodes:
            if node.op == GETITEM:
                self.stage[node] = self.stage[node.args[0]]

    def _cast_early(self) -> None:
        """Cast what later stages take in a smaller type before it is sent to them."""
        for node in self.graph.nodes:
            if self.sources[node] is not Source.ACTIVATION or node in self.returned:
                continue
            later = [user for user in self.users[node] if self.stage[user] > self.stage[node]]
            if later and all(map(_narrows, later)):
                self.stage.update(dict.fromkeys(later, self.stage[node]))

    def _own(self) -> None:
        """Give what only parameters feed to the first stage that uses it."""
        for node in reversed(self.graph.nodes):
            if self.sources[node] is Source.WEIGHT:
                using = [self.stage[user] for user in self.users[node]]
                using += [self.last] * (node in self.returned)
                self.stage[node] = min(using, default=self.stage[node])
                if node.op == INPUT and node.args[1] in self.held:
                    (self.stage[node],) = self.held[node.args[1]]

    def computing(self) -> dict[Node, frozenset[int]]:
        """The stages that compute each node, or take it if it is an input."""
        found: dict[Node, frozenset[int]] = {}
        kept = {each.node for each in self.graph.outputs_of(OutputKind.BUFFER)}
        for node in reversed(self.graph.nodes):
            own = frozenset([self.stage[node]])
            if self.sources[node] is not Source.FREE:
                found[node] = own
                continue
            using = [found[user] for user in self.users[node]] + [own] * (node in kept)
            if node in self.returned:
                using.append(frozenset(range(self.last + 1)))
            found[node] = frozenset().union(*using)
        return found

    def holders(self) -> dict[str, tuple[int, ...]]:
        """By parameter and buffer that the forward uses or writes: the stages that hold it."""
        computing = self.computing()
        used = {
            node.args[1]: tuple(sorted(computing[node]))
            for node in self.graph.inputs
            if node.of_model and computing[node] and (self.users[node] or node in self.returned)
        }
        written = self.graph.outputs_of(OutputKind.BUFFER)
        return {each.name: (self.stage[each.node],) for each in written} | used


def _narrows(node: Node) -> bool:
    """Whether a node casts a value to a smaller type."""
    if node.op != aten._to_copy.default:
        return False
    size: int = node.args[0].tensor.dtype.itemsize
    return node.tensor.dtype.itemsize < size


def _check_alone(draft: Draft, statement: Stages) -> None:
    """Raises `PlanError` for an axis that holds the stages and is to split tensors too."""
    entering = (pin for pins in draft.entering.values() for _, pin in pins)
    pins = (*draft.inputs.values(), *draft.stored.values(), *draft.values.values(), *entering)
    used = [
        (axis, each) for pin in pins for axis in pin.layout.axes_used for each in pin.statements
    ]
    used += [(axis, region.statement) for region in draft.regions for axis in region.axes]
    used += [(axis, each.statement) for each in draft.attending for axis in each.statement.over]
    used += [(each.depth, each) for each in draft.plan.of(Summa) if each.depth is not None]
    for axis, other in used:
        named = not isinstance(other, Spread) or axis in other.over
        if axis in statement.over and (named or isinstance(other, Summa)):
            raise draft.plan.error(
                "P501",
                f"`{other.verb}` splits tensors over `{axis}`, whose ranks run different stages",
                [other, statement],
                help="give the two statements different axes of the mesh",
            )


def _check_written(draft: Draft, cut: _Cut, statement: Stages) -> None:
    """Raises `PlanError` for a buffer that one stage writes and another reads."""
    holders = cut.holders()
    for output in draft.graph.outputs_of(OutputKind.BUFFER):
        writer = cut.stage[output.node]
        readers = [stage for stage in holders.get(output.name, ()) if stage != writer]
        if readers:
            raise draft.plan.error(
                "P501",
                f"stage {writer} writes the buffer `{output.name}`, and stage {readers[0]} reads "
                "it",
                statement,
                help="cut the model elsewhere, so that one stage does both",
            )


def _check_held(draft: Draft, cut: _Cut, statement: Stages) -> None:
    """Raises `PlanError` for a variant in which a stage takes what none before it holds."""
    holders = cut.holders()
    for node in draft.graph.inputs:
        known = draft.held.get(node.args[1]) if node.of_model else None
        if known is None:
            continue
        if node.args[0] == InputKind.PARAMETER:
            wrong = [cut.stage[user] for user in cut.users[node] if cut.stage[user] < known[0]]
        else:
            wrong = [stage for stage in holders.get(node.args[1], ()) if stage not in known]
        if wrong:
            mode = {"train": "training", "eval": "evaluation"}.get(draft.captured.mode, "inference")
            raise draft.plan.error(
                "P501",
                f"in {mode}, stage {wrong[0]} takes `{node.args[1]}`, which stage {known[0]} holds",
                statement,
                help="cut the model where all of its modes use each tensor in the same stages",
            )


class _Boundaries:
    """Where in a forward the stages begin that a statement names."""

    def __init__(self, draft: Draft, statement: Stages) -> None:
        self.draft, self.statement, self.graph = draft, statement, draft.graph
        self.sources = sources(draft.graph)
        self.activations = {
            node: place
            for place, node in enumerate(draft.graph.nodes)
            if self.sources[node] is Source.ACTIVATION
        }
        self.beginnings = beginnings(draft.graph)
        self.named: dict[str, Selector] = {}
        """By module that begins a stage: the selector that matches it."""

    def starts(self) -> list[int]:
        """The place of the first node of each stage but the first."""
        modules = self._modules()
        self._check_count(modules)
        found: list[int] = []
        first = next(iter(self.activations.values()), 0)
        for number, (before, module) in enumerate(zip(("", *modules), modules, strict=False), 1):
            start = self._start(module)
            if start is None:
                start = max(self._start_of_held(number), *found, first + 1)
            elif not found and start <= first:
                raise self._error(
                    module,
                    f"nothing runs before `{module}`: the first stage would be empty",
                    "name a module that runs later",
                )
            elif found and start <= found[-1] and self.draft.variant_of is None:
                raise self._disorder(before, module, start == found[-1])
            found.append(start)
        return found

    def _modules(self) -> list[str]:
        """The modules that begin stages, in the order of the targets; those that one target
        matches are in the order in which they run."""
        found = list[str]()
        names = dict.fromkeys([*modules_of(self.draft), *filter(None, self.beginnings)])
        for target in self.statement.targets:
            matched = target.match(names)
            if not matched:
                raise nothing_matches(target, names)
            self.named = {**dict.fromkeys(matched, target), **self.named}
            starts = {name: self._start(name) for name in matched}
            end = len(self.graph.nodes)
            found += sorted(matched, key=lambda name: end if (s := starts[name]) is None else s)
        return list(dict.fromkeys(found))

    def _start(self, module: str) -> int | None:
        """The place of the first node inside a module; None if a variant does not run it."""
        begun = self.beginnings.get(module)
        if begun is None:
            if self.draft.variant_of is not None:
                return None
            if runs(self.graph, module):
                when = "computes nothing that depends on both weights and inputs"
            elif evaluated(self.draft, module) is not None:
                when = "runs in eval mode alone"
            else:
                when = "is never run"
            raise self._error(
                module,
                f"no stage can begin at {module_text(module)}, which {when}",
                "name a module that computes something from weights and inputs",
            )
        if len(begun.calls) > 1:
            raise self._error(
                module,
                f"`{module}` runs in several places, of which each could begin the stage",
                "name a module that runs once",
            )
        return begun.place

    def _start_of_held(self, number: int) -> int:
        """Where a stage begins in a variant that does not run the module: at the first node that
        takes what it or a later stage holds."""
        held = self.draft.held
        later: set[Node] = set()
        for node in self.graph.nodes:
            weight = node.op == INPUT and node.of_model
            if weight and self.sources[node] is Source.WEIGHT:
                if held.get(node.args[1], (0,))[0] >= number:
                    later.add(node)
            elif not later.isdisjoint(node.operands()):
                if node in self.activations:
                    return self.activations[node]
                later.add(node)
        return len(self.graph.nodes)

    def _check_count(self, modules: Sequence[str]) -> None:
        statement, mesh = self.statement, self.draft.mesh
        wanted = mesh.size(statement.over) * statement.virtual
        if len(modules) + 1 != wanted:
            sizes = ", ".join(f"{axis}={mesh.size(axis)}" for axis in statement.over)
            times = f" times virtual={statement.virtual}" if statement.virtual > 1 else ""
            named = either(selectors_of(modules), "and")
            help = f"name {plural(wanted - 1, 'module')} after `at`, not {named}"
            if wanted == 1:
                help = "remove the statement, or give the axis more ranks"
            raise self.draft.plan.error(
                "P304",
                f"there are {len(modules) + 1} stages, but {sizes}{times} makes {wanted}",
                statement,
                help=help,
            )

    def _disorder(self, before: str, module: str, same: bool) -> Exception:
        if same:
            return self._error(
                module,
                f"nothing runs between the beginnings of `{before}` and `{module}`: a stage would "
                "be empty",
                "leave out one of the two",
            )
        return self._error(
            module,
            f"`{module}` runs before `{before}`, and a stage cannot take values of a later one",
            "name the modules in the order in which they run",
        )

    def _error(self, module: str, message: str, help: str) -> Exception:
        """An error at the selector that names a module."""
        return self.draft.plan.error("P501", message, self.named[module].span, help=help)

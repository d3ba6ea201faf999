"""`stages N balance=flops`: choose where the stages of a pipeline begin.

Before:  stages 3 balance=flops over pp microbatches=8
After:   stages at blocks.2, blocks.4 over pp microbatches=8

Stages begin with modules, and where fewer bytes go over the cut than at the modules next to it:
between the blocks of a transformer, not inside its attention. What is computed and held there is
measured on the graph of forward and backward that the plan makes without stages, on one rank, for
one microbatch (`_Costs`); the cuts are the best of all (`Balancer`).
Requires: pins that divide. Ensures: a plan whose stages name modules.
Elsewhere: the automatic partition of PipeDream, and that of torchgpipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby, pairwise

from meshwright.compiler.graph.aliasing import node_bytes, storage
from meshwright.compiler.graph.flops import flops
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Graph,
    InputKind,
    Node,
    OutputKind,
    Phase,
    TensorType,
)
from meshwright.compiler.schedules.actions import actions_of
from meshwright.compiler.schedules.balanced import Balance, Balancer
from meshwright.compiler.schedules.named import planned_table
from meshwright.compiler.schedules.simulate import in_flight
from meshwright.compiler.schedules.tables import Size, Table
from meshwright.dsl.errors import plural
from meshwright.dsl.selectors import quote_segment
from meshwright.dsl.statements import Stages
from meshwright.dsl.writing.printer import cells
from meshwright.passes.differentiate import differentiate
from meshwright.passes.hoist import hoist
from meshwright.passes.move_varies import move_varies
from meshwright.passes.partition import partition
from meshwright.passes.statements.accumulate import microbatches
from meshwright.passes.statements.draft import Draft, on_graph
from meshwright.passes.statements.stages import Source, beginnings, sources, with_origins

MEASURED = (partition, hoist, on_graph(move_varies), differentiate)
"""The passes that make the graph of forward and backward."""


def balance(draft: Draft) -> Draft:
    """`draft` with the modules at which stages begin, where the plan only says how many."""
    for statement in draft.plan.of(Stages):
        if statement.count is not None and statement.count > 1:
            return _balanced(draft, statement, statement.count)
    return draft


def _balanced(draft: Draft, statement: Stages, count: int) -> Draft:
    table = _table(draft, statement)
    costs = _Costs(draft)
    candidates = _candidates(draft, costs, count)
    if len(candidates) < count - 1:
        raise draft.plan.error(
            "P501",
            f"the model cannot be cut into {plural(count, 'stage')}: modules that run once begin "
            f"in {plural(len(candidates), 'place')} behind its first operator",
            statement,
            help="have fewer stages, or more layers",
        )
    by = statement.balance or "flops"
    balancer = costs.balancer(by, list(candidates), table)
    cuts = balancer.best()
    found = Balance(by, balancer.of_ranks(cuts))
    if not any(found.costs):
        raise draft.plan.error(
            "P501",
            f"nothing in the model counts for `balance={by}`",
            [statement.at("balance")],
            help="write `balance=memory`, or name the modules with which stages begin",
        )
    names = list(candidates.values())
    text = _text(statement, [names[cut - 1] for cut in cuts])
    return replace(draft, plan=draft.plan.with_text(statement, text), balance=found)


def _text(statement: Stages, modules: Sequence[str]) -> str:
    """The statement that names the modules at which its stages begin."""
    named = (".".join(map(quote_segment, module.split("."))) for module in modules)
    parts = {key: span for key, span in statement.parts.items() if key not in ("count", "balance")}
    bare = replace(statement, count=None, balance=None, parts=parts)
    verb, _, *rest = cells(bare)
    return " ".join(filter(None, [verb, "at", ", ".join(named), *rest]))


def _table(draft: Draft, statement: Stages) -> Table:
    found = microbatches(draft.plan)
    size = Size(draft.mesh.size(statement.over), found[1] if found else 1, statement.virtual)
    return planned_table(statement, size)


def _candidates(draft: Draft, costs: _Costs, count: int) -> dict[int, str]:
    """By place: the outermost module that begins there, where few bytes are sent; everywhere, if
    these are too few places."""
    found: dict[int, str] = {}
    first = min(costs.activations.values(), default=0)
    for module, begun in beginnings(draft.graph).items():
        if module in draft.modules and begun.place > first and len(begun.calls) == 1:
            found.setdefault(begun.place, module)
    found = dict(sorted(found.items()))
    narrow = {place: found[place] for place in _lowest(list(found), costs.sent)}
    return narrow if len(narrow) >= count - 1 else found


def _lowest(places: Sequence[int], heights: Sequence[int]) -> Iterator[int]:
    """The places at which heights are lower than before and behind, those next to each other that
    are equal taken as one."""
    groups = [(height, list(g)) for height, g in groupby(places, lambda place: heights[place])]
    for i, (height, group) in enumerate(groups):
        beside = [groups[j][0] for j in (i - 1, i + 1) if 0 <= j < len(groups)]
        if all(height < other for other in beside):
            yield from group


class _Costs:
    """What the nodes of a forward cost, by their places in it.

    A weight counts where it is first used, and what no parameter feeds, which every stage computes,
    does not count.
    """

    def __init__(self, draft: Draft) -> None:
        self.graph = draft.graph
        self.sources, self.users = sources(draft.graph), draft.graph.users()
        self.places = self._places()
        self.activations = {
            node: place
            for node, place in self.places.items()
            if self.sources[node] is Source.ACTIVATION
        }
        self.sent = self._sent()
        size = len(draft.graph.nodes)
        self.work, self.held, self.saved = [0] * size, [0] * size, [0] * size
        """Operations, bytes of parameters with their gradients and moments, and bytes that are
        saved for the backward."""
        self._measure(draft)

    def _places(self) -> dict[Node, int]:
        found: dict[Node, int] = {}
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        for node in reversed(self.graph.nodes):
            if self.sources[node] is Source.ACTIVATION:
                found[node] = order[node.args[0] if node.op == GETITEM else node]
            elif self.sources[node] is Source.WEIGHT:
                using = [found[user] for user in self.users[node]]
                found[node] = min(using, default=len(order) - 1)
        return found

    def _sent(self) -> list[int]:
        """By place: the bytes of activations that are computed before it and used from it on."""
        steps = [0] * (len(self.graph.nodes) + 1)
        for node, place in self.activations.items():
            last = max((self.places[user] for user in self.users[node]), default=place)
            if isinstance(node.type, TensorType) and last > place:
                steps[place + 1] += node.type.num_bytes
                steps[last + 1] -= node.type.num_bytes
        return list(accumulate(steps))

    def _measure(self, draft: Draft) -> None:
        """Fill in the costs from the graph of forward and backward, whose nodes are told apart by
        what they come from."""
        by_name = {node.name: place for node, place in self.places.items()}
        tagged = with_origins(draft, lambda node: replace(node.origin, forward=node.name))
        for each in MEASURED:
            tagged = each(tagged)
        graph, places = tagged.graph, dict[Node, int]()
        forward = {node.name: node for node in graph.nodes if node.phase is Phase.FORWARD}
        for node in graph.nodes:
            name = node.origin.forward
            if node.phase is not Phase.FORWARD:
                name = forward[name].origin.forward if name in forward else ""
            if name in by_name:
                places[node] = by_name[name]
                self.work[by_name[name]] += flops(node, graph.mesh)
        self._hold(graph, by_name)
        self._save(graph, places)

    def _hold(self, graph: Graph, by_name: Mapping[str, int]) -> None:
        trained = {each.name: each.node for each in graph.outputs_of(OutputKind.GRADIENT)}
        for node in graph.inputs:
            if node.args[0] == InputKind.PARAMETER and node.origin.forward in by_name:
                size = node_bytes(node, graph)
                if gradient := trained.get(node.args[1]):
                    own, other = node.tensor.dtype.itemsize, gradient.tensor.dtype.itemsize
                    size += 3 * size // own * other
                self.held[by_name[node.origin.forward]] += size

    def _save(self, graph: Graph, places: Mapping[Node, int]) -> None:
        """What the backward takes of the forward, once, where it is first taken."""
        of = sources(graph)
        first: dict[Node, int] = {}
        for node, place in places.items():
            for operand in node.operands() if node.phase is not Phase.FORWARD else ():
                kept = storage(operand)
                saved = kept.phase is Phase.FORWARD and kept.op != INPUT
                if saved and of[kept] is Source.ACTIVATION:
                    first[kept] = min(place, first.get(kept, place))
        for node, place in first.items():
            self.saved[place] += node_bytes(node, graph)

    def balancer(self, by: str, starts: Sequence[int], table: Table) -> Balancer:
        """The costs of the pieces between `starts`; `memory` is that of all microbatches which a
        stage has in flight under the schedule."""
        ends = [0, *starts, len(self.graph.nodes)]
        once, each = {
            "flops": (self.work, None),
            "parameters": (self.held, None),
            "memory": (self.held, self.saved),
        }[by]
        sums = [_sums(costs, ends) if costs else [0] * len(ends) for costs in (once, each)]
        flying = [_in_flight(table, stage) for stage in range(len(table.holders))]

        def cost(stage: int, first: int, last: int) -> int:
            once, each = (found[last] - found[first] for found in sums)
            return once + flying[stage] * each

        ranks = [
            [stage for stage, places in enumerate(table.holders) if rank in places]
            for rank in table.coordinates
        ]
        return Balancer(cost, [0, *(self.sent[start] for start in starts)], ranks)


def _sums(costs: Sequence[int], ends: Sequence[int]) -> list[int]:
    """What is before each end."""
    return [0, *accumulate(sum(costs[first:last]) for first, last in pairwise(ends))]


def _in_flight(table: Table, stage: int) -> int:
    """For how many microbatches a rank holds a stage's activations at once."""
    rows = tuple(
        tuple(action for action in actions_of(row) if action.stage == stage) for row in table.rows
    )
    own = replace(table, rows=rows)
    return max(in_flight(own, place) for place in table.holders[stage])

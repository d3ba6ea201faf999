"""`stages N balance=flops`: choose where the stages of a pipeline begin.

Before:  stages 3 balance=flops over pp microbatches=8
After:   stages at blocks.2, blocks.4 over pp microbatches=8

Stages begin with modules, and where few bytes go over the cut: between the blocks of a transformer,
not inside its attention (`_narrow`). What is computed and held there is measured on the graph of
forward and backward that the plan makes without stages, on one rank, for one microbatch, with what
the backward computes again (`_Costs`); the cuts are the best of all (`Balancer`).
Requires: pins that divide. Ensures: a plan whose stages name modules.
Elsewhere: the automatic partition of PipeDream, and that of torchgpipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

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
from meshwright.compiler.schedules.simulate import in_flight
from meshwright.compiler.schedules.tables import Table
from meshwright.dsl.errors import plural
from meshwright.dsl.statements import Stages
from meshwright.dsl.suggest import selectors_of
from meshwright.dsl.writing.printer import cells
from meshwright.passes.differentiate import differentiate
from meshwright.passes.move_varies import move_varies
from meshwright.passes.needs import Needs
from meshwright.passes.partition import partition
from meshwright.passes.placing.bias import bias_apart
from meshwright.passes.schedule import training_table
from meshwright.passes.statements.checkpoint import Regions
from meshwright.passes.statements.draft import Draft
from meshwright.passes.statements.sequences.split import gathers_again
from meshwright.passes.statements.stages import Source, beginnings, sources, with_origins

MEASURED = (bias_apart, partition, move_varies, differentiate)
"""The passes that make the graph of forward and backward."""


def balance(draft: Draft) -> Draft:
    """`draft` with the modules at which stages begin, where the plan only says how many."""
    for statement in draft.plan.of(Stages):
        if statement.count is not None and statement.count > 1:
            return _balanced(draft, statement, statement.count)
    return draft


def _balanced(draft: Draft, statement: Stages, count: int) -> Draft:
    by, table = statement.balance or "flops", training_table(draft, statement)
    costs, places = _Costs(draft), _places(draft)
    if len(places) < count - 1:
        raise draft.plan.error(
            "P501",
            f"the model cannot be cut into {plural(count, 'stage')}: modules that run once begin "
            f"in {plural(len(places), 'place')} behind its first operator",
            statement,
            help="have fewer stages, or more layers",
        )
    starts = list(places)
    narrow = _narrow(costs.balancer(by, starts, table))
    if len(narrow) >= count - 1:
        starts = [starts[piece - 1] for piece in narrow]
    balancer = costs.balancer(by, starts, table)
    cuts = balancer.best()
    found = Balance(by, balancer.of_ranks(cuts))
    if not any(found.costs):
        raise draft.plan.error(
            "P501",
            f"nothing in the model counts for `balance={by}`",
            [statement.at("balance")],
            help="write `balance=memory`, or name the modules with which stages begin",
        )
    text = _text(statement, [places[starts[cut - 1]] for cut in cuts])
    return replace(draft, plan=draft.plan.with_text(statement, text), balance=found)


def _text(statement: Stages, modules: Sequence[str]) -> str:
    """The statement that names the modules at which its stages begin."""
    named = ", ".join(each for module in modules for each in selectors_of([module]))
    parts = {key: span for key, span in statement.parts.items() if key not in ("count", "balance")}
    verb, _, *rest = cells(replace(statement, count=None, balance=None, parts=parts))
    return " ".join(filter(None, [verb, "at", named, *rest]))


def _places(draft: Draft) -> dict[int, str]:
    """By place at which a stage can begin: the outermost module that begins there."""
    begun = beginnings(draft.graph)
    first = min((each.place for each in begun.values()), default=0)
    found: dict[int, str] = {}
    for module, each in begun.items():
        if module and each.place > first and len(each.calls) == 1:
            found.setdefault(each.place, module)
    return dict(sorted(found.items()))


def _narrow(balancer: Balancer) -> list[int]:
    """The pieces before which stages may begin: not those between two others before which fewer
    bytes are sent, less than a stage's share apart."""
    sent, share = balancer.sent, balancer.cost(0, 0, balancer.num_pieces) / balancer.num_stages
    found: list[int] = []
    for piece in range(1, balancer.num_pieces):
        before = next((i for i in range(piece - 1, 0, -1) if sent[i] < sent[piece]), None)
        behind = (i for i in range(piece + 1, balancer.num_pieces) if sent[i] < sent[piece])
        after = next(behind, None)
        wide = before is None or after is None or balancer.cost(0, before, after) > share
        if wide:
            found.append(piece)
    return found


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
        phases = (Phase.FORWARD, Phase.BACKWARD)
        regather = partial(gathers_again, tagged.regions)
        needs = Needs(graph, phases, regather, Regions(tagged.checkpoints, graph))
        for node, around in needs.again[Phase.BACKWARD]:
            if around and node in places:
                self.work[places[node]] += flops(node, graph.mesh)
        self._hold(graph, by_name)
        self._save(graph, needs, places)

    def _hold(self, graph: Graph, by_name: Mapping[str, int]) -> None:
        trained = {each.name: each.node for each in graph.outputs_of(OutputKind.GRADIENT)}
        for node in graph.inputs:
            if node.args[0] == InputKind.PARAMETER and node.origin.forward in by_name:
                size = node_bytes(node, graph)
                if gradient := trained.get(node.args[1]):
                    own, other = node.tensor.dtype.itemsize, gradient.tensor.dtype.itemsize
                    size += 3 * size // own * other
                self.held[by_name[node.origin.forward]] += size

    def _save(self, graph: Graph, needs: Needs, places: Mapping[Node, int]) -> None:
        """What the backward takes of the forward, once, where it is first taken."""
        of, backward = sources(graph), Phase.BACKWARD
        first: dict[Node, int] = {}
        own = ((n, None) for n in graph.nodes if needs.home[n] is backward)
        for node, around in (*own, *needs.again[backward]):
            for value in needs.operands(backward, node, around) if node in places else ():
                kept, place = storage(value[0]), places[node]
                saved = value in needs.saved[backward] and kept.op != INPUT
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
        most = [max(flying(table, stage).values()) for stage in range(len(table.holders))]

        def cost(stage: int, first: int, last: int) -> int:
            once, each = (found[last] - found[first] for found in sums)
            return once + most[stage] * each

        ranks = [
            [stage for stage, places in enumerate(table.holders) if rank in places]
            for rank in table.coordinates
        ]
        return Balancer(cost, [0, *(self.sent[start] for start in starts)], ranks)


def _sums(costs: Sequence[int], ends: Sequence[int]) -> list[int]:
    """What is before each end."""
    return [0, *accumulate(sum(costs[first:last]) for first, last in pairwise(ends))]


def flying(table: Table, stage: int) -> dict[int, int]:
    """By the place of ranks that hold a stage: for how many microbatches they hold its activations
    at once."""
    rows = tuple(
        tuple(action for action in actions_of(row) if action.stage == stage) for row in table.rows
    )
    own = replace(table, rows=rows)
    return {place: in_flight(own, place) for place in table.holders[stage]}

"""Choose the regions of the model that the backward computes again.

Before:  linear: f32[8, 16, 64]             = linear(getitem, block_up_weight)
         relu: f32[8, 16, 64]               = relu(linear)
         threshold_backward: f32[8, 16, 64] = threshold_backward(matmul, relu, 0)
After:   linear: f32[8, 16, 64]             = linear(getitem, block_up_weight)
         relu: f32[8, 16, 64]               = relu(linear)
         linear_again: f32[8, 16, 64]       = linear(getitem_again, block_up_weight)
         relu_again: f32[8, 16, 64]         = relu(linear_again)
         threshold_backward: f32[8, 16, 64] = threshold_backward(matmul, relu_again, 0)

A region is one call of a module or, with `segments=`, several one after another, with what runs
between them. What enters a region is saved, and so is what leaves it if the backward takes it; all
else that the backward takes is computed again, where it is first taken (`needs.py` finds out what,
`separate.py` writes it down). Saved as well are the operators that `keep=` names, and whatever
ranks have sent one another, but for the gathers that the backward repeats in any case.
Requires: a normalised graph. Ensures: the regions that `separate` reads.
Elsewhere: torch.utils.checkpoint (Chen et al., 1604.06174), whose `segments` are these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TypeAlias

from meshwright.compiler.composites.norm import NormFinish
from meshwright.compiler.composites.ring_attention import RingStep
from meshwright.compiler.graph.ir import GETITEM, INPUT, Graph, Node, Op, Phase, op_stem
from meshwright.compiler.graph.names import fold
from meshwright.compiler.graph.transfers import is_collective
from meshwright.dsl.errors import PlanError, either, nearest, plural
from meshwright.dsl.statements import Checkpoint
from meshwright.dsl.suggest import selectors_of
from meshwright.passes.statements.draft import Call, Checkpointed, Draft
from meshwright.passes.statements.families import NARROWED, family
from meshwright.passes.statements.pins import module_text
from meshwright.passes.statements.targets import evaluated, modules_of

Around: TypeAlias = tuple[Checkpointed, ...]
"""The regions around a node, the outermost first."""

_SYNONYMS = {"sdpa": "attention"}
_LOWERED: dict[Op, str] = {NormFinish.op: "norm", RingStep.op: "attention"}
"""The families of operators that others have become before `separate` looks for them."""


def checkpoint(draft: Draft) -> Draft:
    """`draft` with the regions of its `checkpoint` statements, which evaluation does not have.

    Of those with a budget nothing is known yet but that they can be read.
    """
    if not draft.plan.of(Checkpoint):
        return draft
    resolved = draft.plan.resolve(Checkpoint, modules_of(draft, Checkpoint), budget=None)
    if draft.captured.mode != "train":
        return draft
    around = _calls(draft.graph)
    if draft.variant_of is None:
        _check(draft, around)
    by_statement: dict[int, tuple[Checkpoint, list[Call]]] = {}
    for call in around:
        if (statement := resolved.get(call[0])) is not None:
            by_statement.setdefault(id(statement), (statement, []))[1].append(call)
    found: dict[Call, Checkpointed] = {}
    for statement, calls in by_statement.values():
        for together in _regions(draft, statement, calls, around):
            names = [path for path, _ in together]
            name = ", ".join(fold(names, draft.modules)) or "the model"
            region = Checkpointed(name, statement, len(together) > 1)
            found.update(dict.fromkeys(together, region))
    return replace(draft, checkpoints=found)


def _calls(graph: Graph) -> dict[Call, tuple[Call, ...]]:
    """The calls of modules in the order in which they begin, each with those around it."""
    found: dict[Call, tuple[Call, ...]] = {}
    for node in graph.nodes:
        stack = calls_around(node) if node.op != INPUT else ()
        for depth, call in enumerate(stack):
            found.setdefault(call, stack[:depth])
    return found


def calls_around(node: Node) -> tuple[Call, ...]:
    """The calls of modules that a node is in, the outermost first."""
    origin = node.origin
    return tuple((path, origin.calls[: i + 1]) for i, (path, _) in enumerate(origin.modules))


def _regions(
    draft: Draft,
    statement: Checkpoint,
    calls: Sequence[Call],
    around: Mapping[Call, tuple[Call, ...]],
) -> Iterator[Sequence[Call]]:
    """The calls of a statement by region."""
    if statement.segments is None:
        yield from ([call] for call in calls)
        return
    own = set(calls)
    outer = [call for call in calls if own.isdisjoint(around[call])]
    if statement.segments > len(outer) and draft.variant_of is None:
        raise draft.plan.error(
            "P501",
            f"{plural(len(outer), 'module')} cannot make {statement.segments} segments",
            statement.at("segments"),
            help=f"write `segments={len(outer)}` or less, or leave it out: then each is one",
        )
    count = min(statement.segments, len(outer))
    size, more = divmod(len(outer), count)
    ends = accumulate((size + (i < more) for i in range(count)), initial=0)
    yield from (outer[start:end] for start, end in pairwise(ends))


def _check(draft: Draft, calls: Iterable[Call]) -> None:
    """Raises `PlanError` for a selector all of whose modules never run, and for a word after
    `keep=` that is neither a family nor an operator of the model."""
    ran = {path for path, _ in calls}
    names = modules_of(draft, Checkpoint)
    known = words_of(draft.graph)
    for statement in draft.plan.of(Checkpoint):
        for target in statement.targets:
            matched = target.match(names)
            if ran.isdisjoint(matched) and not any(evaluated(draft, name) for name in matched):
                inner = [n for n in draft.modules if n in ran and _inside(n, matched)]
                raise draft.plan.error(
                    "P501",
                    f"`checkpoint` needs modules that run, and {module_text(target.text)} never "
                    "does",
                    target.span or statement.span,
                    help=f"name what it holds: {either(selectors_of(inner)[:3])}"
                    if inner
                    else "remove it",
                )
        for word in statement.keep:
            path, _, operator = word.rpartition(".")
            if _SYNONYMS.get(operator, operator) not in known:
                raise _unknown(draft, statement, word, known)
            if path and not any(_ends(name, path) for name in ran):
                raise _nowhere(draft, statement, word)


def words_of(graph: Graph) -> set[str]:
    """The words that `keep=` takes for the operators of a graph, and for families."""
    return {*NARROWED, *(word for node in graph.nodes for word in keep_words(node))}


def _ends(name: str, path: str) -> bool:
    """Whether the path of a module ends with these names."""
    return f".{name}".endswith(f".{path}")


def _inside(name: str, paths: Iterable[str]) -> bool:
    return name.rpartition(".")[0] in paths


def _unknown(draft: Draft, statement: Checkpoint, word: str, known: Iterable[str]) -> PlanError:
    """The error for a word after `keep=` that names nothing."""
    families = sorted({*NARROWED, *_SYNONYMS, "linear"})
    close = nearest(word, [*families, *known])
    return draft.plan.error(
        "P401",
        f"`keep={word}` matches nothing",
        statement.at("keep"),
        help=f"write `{close[0]}`"
        if close
        else f"write {either(families)}, or an operator as `graph` prints it, such as `gelu`",
    )


def _nowhere(draft: Draft, statement: Checkpoint, word: str) -> PlanError:
    """The error for a word after `keep=` that names an operator of no module."""
    path, _, operator = word.rpartition(".")
    names = (name.rpartition(".")[2] for name, _ in _calls(draft.graph) if name)
    close = nearest(path, sorted(set(names)))
    return draft.plan.error(
        "P401",
        f'`keep="{word}"` matches nothing: no module that runs ends with `{path}`',
        statement.at("keep"),
        help=f'write `"{close[0]}.{operator}"`'
        if close
        else f"write `{operator}` for that of every module",
    )


def keep_words(node: Node) -> Iterator[str]:
    """The words after `keep=` that name an operator: its own, and those of one that it does a part
    of. What ranks send each other for that is not computed, so not kept."""
    replaced = None if is_collective(node) else node.origin.replaced
    for op in (node.op, replaced):
        if op is not None:
            yield op_stem(op)
            if found := family(op) or _LOWERED.get(op):
                yield found


class Regions:
    """The regions around the nodes of a graph.

    What runs between the modules of a region is in it too, unless it is in another region.
    """

    def __init__(self, checkpoints: Mapping[Call, Checkpointed], graph: Graph) -> None:
        self.around: dict[Node, Around] = {}
        """By node of the forward: the regions that it is in; of others, it has none."""
        own = (n for n in graph.nodes if n.phase is Phase.FORWARD and n.op != INPUT)
        forward = list(own) if checkpoints else []
        for node in forward:
            found = (checkpoints.get(call) for call in calls_around(node))
            self.around[node] = tuple(dict.fromkeys(region for region in found if region))
        # Weights are brought to where they are used, and results taken apart, in other places.
        weights = {node for node in graph.nodes if node.of_model}
        for node in forward:
            if (operands := set(node.operands())) and operands <= weights:
                weights.add(node)
        self._fill([n for n in forward if n not in weights and n.op != GETITEM])
        for node in forward:
            if node.op == GETITEM:
                self.around[node] = self.around.get(node.args[0], ())

    def _fill(self, order: Sequence[Node]) -> None:
        """Put what runs between the modules of a region into it."""
        ends: dict[Checkpointed, tuple[int, int]] = {}
        for place, node in enumerate(order):
            for region in self.around[node]:
                if region.joined:
                    ends[region] = ends.get(region, (place, place))[0], place
        for region, (first, last) in ends.items():
            around = self.around[order[first]]
            outer = around[: around.index(region)]
            for node in order[first:last]:
                if self.around[node] == outer:
                    self.around[node] = (*outer, region)

    def keeps(self, node: Node) -> bool:
        """Whether the innermost region around a node saves what operators like it compute, or like
        it in its module."""
        around = self.around.get(node, ())
        return bool(around) and any(keep_names(word, node) for word in around[-1].statement.keep)


def keep_names(word: str, node: Node) -> bool:
    """Whether a word after `keep=` names a node."""
    path, _, operator = word.rpartition(".")
    if path and not _ends(node.origin.module, path):
        return False
    return _SYNONYMS.get(operator, operator) in keep_words(node)

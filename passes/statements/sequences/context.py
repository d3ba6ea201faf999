"""Split sequences over ranks, attention included.

Before:  add: f32[8, 8, 24]                         = add(embedding, embedding_1)
         attention: (f32[8, 4, 8, 6], f32[8, 4, 8]) = mesh::attention(unbind_0, unbind_1, unbind_2,
             None, True, None, 0.0, 0)
After:   add: f32[8, 8@cp, 24]                            = add(embedding, embedding_1)
         attention: (f32[8, 4, 8@cp, 6], f32[8, 4, 8@cp]) = mesh::ring_attention(unbind_0, unbind_1,
             unbind_2, None, True, None, 0.0, 0, [cp], 2, contiguous,
             None)

What enters a module is split along the sequence and stays so, since every operator but attention
treats the tokens of a sequence apart: positions and targets follow. Attention is an operator that
sends keys and values round (`method=ring`), or is split by head (`attention.py`).
Requires: a normalised graph. Ensures: the modules that the partitioner reads, whose sequences
divide.
Elsewhere: Ring Attention (2310.01889), DeepSpeed Ulysses (2309.14509).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product

from meshwright.compiler.composites.attention import Attention
from meshwright.compiler.composites.ring_attention import Ring, RingAttention
from meshwright.compiler.graph.ir import Builder, Graph, Node, map_nodes, rewrite
from meshwright.compiler.graph.text import node_type_text, op_text
from meshwright.dsl.statements import Context
from meshwright.passes.statements.draft import Attending, Draft
from meshwright.passes.statements.pins import module_text
from meshwright.passes.statements.sequences.attention import TOKENS, Contexts
from meshwright.passes.statements.sequences.reach import reach
from meshwright.passes.statements.sequences.regions import overlap
from meshwright.passes.statements.sequences.zigzag import zigzag
from meshwright.passes.statements.targets import modules_of, of_modules


def context(draft: Draft) -> Draft:
    """Note the modules of each `context` statement.

    Raises `PlanError` for a module without attention, and for sequences that do not divide.
    """
    for _ in of_modules(_attention, Context, draft, "attention"):
        pass  # each module has some
    by_statement: dict[int, tuple[Context, set[str]]] = {}
    for module, statement in draft.plan.resolve(Context, modules_of(draft, Context)).items():
        by_statement.setdefault(id(statement), (statement, set()))[1].add(module)
    attending = tuple(
        Attending(frozenset(modules), statement) for statement, modules in by_statement.values()
    )
    contexts = Contexts(draft.graph, attending, draft.mesh)
    if not contexts.attending:
        return draft
    _check_lengths(draft, contexts)
    _check_regions(draft, attending)
    draft = replace(_in_rings(draft, contexts), attending=attending)
    for each in contexts.attending:
        draft = _balanced(draft, each.statement)
    return draft


def _attention(graph: Graph) -> dict[str, list[Node]]:
    """The attention that runs in each module or inside of it."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for module, _ in node.origin.modules if node.op == Attention.op else ():
            found.setdefault(module, []).append(node)
    return found


def _in_rings(draft: Draft, contexts: Contexts) -> Draft:
    """`draft` with the attention that goes round a ring as an operator of its own."""
    mesh, mapping = draft.mesh, dict[Node, Node]()
    looks: dict[Node | None, int | None] = {}

    def ring(builder: Builder, node: Node, news: dict[Node, Node]) -> Node:
        statement = contexts.around(node)
        if statement is None or statement.method != "ring":
            mapping[node] = builder.copy(node, news)
        else:
            _check_causal(draft, node, statement)
            *operands, is_causal, scale, dropout_p, op_id = map_nodes(node.args, news.__getitem__)
            over, bias = statement.over, node.args[3]
            if bias not in looks:
                looks[bias] = reach(bias)
            blocks = _blocks(node, mesh.size(over), looks[bias])
            options = Ring(
                *(is_causal, scale, dropout_p, op_id, over, blocks, "contiguous", looks[bias])
            )
            mapping[node] = builder.emit(
                RingAttention.op,
                (*operands, *options),
                type=node.type,
                origin=node.origin,
                requires_grad=node.requires_grad,
                name=node.name,
            )
        return mapping[node]

    return _on(draft, rewrite(draft.graph, ring), mapping)


def _blocks(node: Node, ranks: int, back: int | None) -> int:
    """The number of blocks of keys that the queries of a rank see, its own and those before it."""
    if back is None:
        return ranks
    own: int = node.args[0].tensor.shape[TOKENS] // ranks
    return min(ranks, 1 + -(-back // own))


def _on(draft: Draft, graph: Graph, mapping: Mapping[Node, Node]) -> Draft:
    """`draft` with a graph whose nodes stand for those of its own."""
    entering = {
        mapping[node]: tuple((mapping[value], pin) for value, pin in found)
        for node, found in draft.entering.items()
        if mapping.keys() >= {node, *(value for value, _ in found)}
    }
    values = {mapping[node]: pin for node, pin in draft.values.items() if node in mapping}
    return replace(draft, graph=graph, values=values, entering=entering)


def _balanced(draft: Draft, statement: Context) -> Draft:
    """`draft` with the sequences of a statement in zigzag order, where that balances causal
    attention and changes nothing else.

    Raises `PlanError` where it does not and the statement asks for it.
    """
    if statement.method != "ring" or statement.order == "contiguous":
        return draft
    ranks = draft.mesh.size(statement.over)
    contexts = Contexts(draft.graph, draft.attending, draft.mesh)
    rings = [node for node in draft.graph.nodes if contexts.statement_of(node) is statement]
    lengths = {node.args[i].tensor.shape[TOKENS] for node in rings for i in range(2)}
    asked = statement.order == "zigzag"
    if not asked and not any(Ring.of(node.args, 4).is_causal for node in rings):
        return draft
    length = min(lengths)
    if len(lengths) > 1 or length % (2 * ranks):
        help = f"use sequences of one length that {2 * ranks} divides"
        return _contiguous(draft, statement, f"ranks have no two equal parts of {length}", help)
    found = zigzag(draft.graph, rings, length, ranks)
    if found.culprit is None:
        return _noted(_on(draft, found.graph, found.mapping), statement, "order=zigzag")
    culprit = found.culprit
    why = f"`{op_text(culprit.op)}` in {module_text(culprit.origin.module)} depends on the order"
    return _contiguous(draft, statement, why, "")


def _contiguous(draft: Draft, statement: Context, why: str, help: str) -> Draft:
    """`draft` as it is, with a note of the reason, unless the statement asks for zigzag order."""
    if statement.order != "zigzag":
        return _noted(draft, statement, f"order=contiguous: {why}")
    raise draft.plan.error(
        "P501",
        f"the sequence cannot be in zigzag order: {why}",
        statement.at("order"),
        help=f"{help}, or write `order=contiguous`" if help else "write `order=contiguous`",
    )


def _noted(draft: Draft, statement: Context, order: str) -> Draft:
    """`draft` with a note of the order that was chosen for a statement that does not say it."""
    if statement.order is not None:
        return draft
    return replace(draft, notes={**draft.notes, statement: order})


def _check_lengths(draft: Draft, contexts: Contexts) -> None:
    """Raises `PlanError` for a sequence that the ranks do not divide, where it enters or where
    attention is."""
    entering = (
        (value, 1, statement)
        for entries in contexts.entries.values()
        for value, statement in entries
    )
    attended = (
        (operand, TOKENS, statement)
        for node in draft.graph.nodes
        if (statement := contexts.around(node)) is not None
        for operand in node.args[:2]
    )
    for value, dim, statement in (*entering, *attended):
        size, ranks = value.tensor.shape[dim], draft.mesh.size(statement.over)
        if size % ranks:
            over = ", ".join(f"{axis}={draft.mesh.size(axis)}" for axis in statement.over)
            lower = size - size % ranks
            lengths = " or ".join(str(n) for n in (lower, lower + ranks) if n)
            fewer = "" if lower else ", or no `context` for what has fewer tokens than ranks"
            raise draft.plan.error(
                "P203",
                f"cannot split a sequence of {size} over {over}",
                statement.at("over"),
                subject=f"{value.name}: {node_type_text(value, draft.graph)}",
                help=f"use sequences of {lengths}{fewer}",
            )


def _check_regions(draft: Draft, attending: Iterable[Attending]) -> None:
    """Raises `PlanError` where `sequence` splits the same sequences over the same axes."""
    for each, region in product(attending, draft.regions):
        axis = next((axis for axis in region.axes if axis in each.statement.over), None)
        if axis is not None and overlap(each, region):
            raise draft.plan.error(
                "P301",
                f"`context` and `sequence` both split sequences over `{axis}`",
                [each.statement, region.statement],
                help="remove `sequence`, or give it the axis of split linears",
            )


def _check_causal(draft: Draft, node: Node, statement: Context) -> None:
    """Raises `PlanError` where ranks do not have the keys of the positions of their queries."""
    q, k, *_ = node.args
    length, keys = q.tensor.shape[TOKENS], k.tensor.shape[TOKENS]
    if node.args[4] and length != keys:
        raise draft.plan.error(
            "P501",
            f"causal attention of {length} queries to {keys} keys cannot go round a ring",
            statement,
            subject=f"{node.origin.module}: {node_type_text(node, draft.graph)}",
            help="write `method=ulysses`",
        )

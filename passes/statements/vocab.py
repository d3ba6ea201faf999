"""Split embeddings and output heads over the vocabulary.

Before:  wte_weight: f32[96, 16]  = input(parameter wte.weight)
         head_weight: f32[96, 16] = input(parameter head.weight)
         embedding: f32[8, 16]    = mesh::embedding(wte_weight, tokens, -1)
         linear: f32[8, 96]       = linear(embedding, head_weight)
After:   wte_weight: f32[96@tp, 16]        = input(parameter wte.weight)
         head_weight: f32[96@tp, 16]       = input(parameter head.weight)
         embedding: f32[8, 16] partial(tp) = mesh::embedding(wte_weight, tokens, -1)
         all_reduce: f32[8, 16]            = all_reduce(embedding, tp)
         linear: f32[8, 96@tp]             = linear(vary, head_weight)

The lookup is masked to the rows that a rank holds; logits stay split into the loss. A vocabulary
that does not divide is pinned longer than it is, and padded by `pad`.
Requires: modules with a lookup or a linear. Ensures: their tables are pinned.
Elsewhere: Megatron's VocabParallelEmbedding and parallel loss, DTensor's loss_parallel.
"""

from __future__ import annotations

from meshwright.compiler.graph.ir import Graph, Node
from meshwright.compiler.layout.factors import cut, whole
from meshwright.compiler.layout.layout import Layout
from meshwright.dsl.statements import Vocab
from meshwright.passes.statements.draft import Draft, Pin
from meshwright.passes.statements.linears import Linear, linears, tables
from meshwright.passes.statements.pins import contradiction, with_pin
from meshwright.passes.statements.targets import of_modules


def vocab(draft: Draft) -> Draft:
    """Pin every table under a `vocab` statement by its vocabulary dim."""
    for statement, found in of_modules(_tables, Vocab, draft, "an embedding or a linear"):
        for table in found:
            draft = _split(draft, table.weight, table.features, statement)
            for bias in table.biases:
                draft = _split(draft, bias, 0, statement)
    return draft


def _tables(graph: Graph) -> dict[str, list[Linear]]:
    """The linears and lookup tables of every module."""
    found = linears(graph)
    for module, each in tables(graph).items():
        found[module] = [*found.get(module, ()), *each]
    return found


def _split(draft: Draft, node: Node, dim: int, statement: Vocab) -> Draft:
    name, shape = node.args[1], node.tensor.shape
    ranks = draft.mesh.size(statement.over)
    rows = -(-shape[dim] // ranks) * ranks
    layout = Layout(
        tuple(
            cut(rows, *statement.over) if i == dim else whole(size) for i, size in enumerate(shape)
        )
    )
    before = draft.inputs.get(name)
    if before is not None and not before.layout.equals(layout, draft.mesh):
        raise contradiction(draft, node, before.statements, statement)
    return with_pin(draft, name, Pin(layout, (statement,)))

"""The list of passes: what holds of each of them."""

from __future__ import annotations

from dataclasses import replace

import meshwright
from meshwright.compiler.graph.ir import Graph
from meshwright.compiler.graph.text import exact_text
from meshwright.compiler.layout.mesh import Mesh
from meshwright.passes.driver import PASSES, REWRITING, capture
from meshwright.passes.statements.draft import Draft
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens


def spelled(graph: Graph) -> list[object]:
    """All that a graph says."""
    nodes = [(n.origin, n.phase, n.layout, n.requires_grad) for n in graph.nodes]
    return [exact_text(graph), *nodes]


def test_no_pass_edits_the_graphs_that_it_is_given() -> None:
    plan = meshwright.Plan.parse(
        f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}vocab wte over tp\nsequence blocks.* over tp"
    )
    model, example = Gpt(layers=1), tokens()
    source, mesh = capture(model, example), Mesh(plan.mesh)
    graph = replace(source.captured.graph, mesh=mesh)
    for rewriting in REWRITING:
        before = spelled(graph)
        rewriting(graph)
        assert spelled(graph) == before, rewriting.__name__
    draft = Draft(plan, mesh, source.captured, graph, source.modules)
    for each in PASSES:
        before = [spelled(graph) for graph in draft.graphs]
        after = each(draft)
        assert [spelled(graph) for graph in draft.graphs] == before, each.__name__
        draft = after

"""The list of passes, and many plans on one capture."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import Graph
from meshwright.compiler.graph.text import exact_text
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.public import Runtime
from meshwright.passes import driver
from meshwright.passes.statements.draft import Draft
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens
from tests.passes.examples import Blocks, sequences

PLANS = (
    "mesh dp=2\ndata x over dp",
    "mesh tp=2\ncolumns block.up over tp\nrows block.down over tp",
    "mesh tp=4\ncolumns block.up over tp\nrows block.down over tp\nsequence block over tp",
    "mesh dp=2, tp=2\ndata x over dp\ncolumns block.up over tp\nrows block.down over tp",
    "mesh dp=2, tp=2\ndata x over dp\nshard block.up.weight [o@tp, i]\nallow replicate **",
)


def test_plans_tried_on_one_capture_give_the_programs_of_whole_compilations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Blocks()
    plans = [mw.Plan.parse(text) for text in PLANS]
    expected = [mw.compile(model, plan, example=sequences()).digest for plan in plans]
    exported = torch.export.export
    calls: list[Any] = []

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return exported(*args, **options)

    monkeypatch.setattr(torch.export, "export", counting)
    captured = driver.capture(model, sequences())
    runtime = Runtime(pytest.fail, pytest.fail, pytest.fail)
    found = [driver.compile_captured(captured, plan, runtime=runtime) for plan in plans]
    assert len(calls) == 1
    assert [program.digest for program in found] == expected
    assert len(set(expected)) == len(PLANS)


@pytest.mark.parametrize(
    "each", [*driver.REWRITING, *driver.PASSES], ids=lambda each: each.__name__
)
def test_each_pass_says_what_it_requires_and_what_it_ensures(each: Callable[..., Any]) -> None:
    text = inspect.getdoc(sys.modules[each.__module__]) or ""
    assert "Requires: " in text
    assert "Ensures: " in text


def test_a_pass_that_breaks_a_graph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(draft: Any) -> Any:
        first, *rest = draft.graph.nodes
        object.__setattr__(draft.graph, "nodes", (*rest, first))
        return draft

    monkeypatch.setattr(driver, "PASSES", (*driver.PASSES[:9], careless, *driver.PASSES[9:]))
    with pytest.raises(PassError, match="after `careless`"):
        mw.compile(Blocks(), mw.Plan.parse(PLANS[1]), example=sequences())


def spelled(graph: Graph) -> list[object]:
    """All that a graph says."""
    nodes = [(n.origin, n.phase, n.layout, n.requires_grad) for n in graph.nodes]
    return [exact_text(graph), *nodes]


def test_no_pass_edits_the_graphs_that_it_is_given() -> None:
    plan = mw.Plan.parse(
        f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}vocab wte over tp\nsequence blocks.* over tp"
    )
    model, example = Gpt(layers=1), tokens()
    source, mesh = driver.capture(model, example), Mesh(plan.mesh)
    graph = replace(source.captured.graph, mesh=mesh)
    for rewriting in driver.REWRITING:
        before = spelled(graph)
        rewriting(graph)
        assert spelled(graph) == before, rewriting.__name__
    draft = Draft(plan, mesh, source.captured, graph, source.modules)
    for each in driver.PASSES:
        before = [spelled(graph) for graph in draft.graphs]
        after = each(draft)
        assert [spelled(graph) for graph in draft.graphs] == before, each.__name__
        draft = after

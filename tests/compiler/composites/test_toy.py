"""A new composite is one class: rules, check, adjoint, lowering and code take it from there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import meshwright
from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import Node
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.placing.composite import COMPOSITES, Composite, LoweringContext
from meshwright.passes.rewriting.rewriter import REWRITES
from tests.compiler.composites import toy
from tests.compiler.composites.toy import BOTH, NAME, SPLIT, WHOLE, Centre, Centred
from tests.equivalence import check_equal
from tests.models import real
from tests.runtime.processes import ROOT, finish, start


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPOSITES, Centre.op, Centre())
    monkeypatch.setitem(REWRITES, NAME, toy.rewritten)


@pytest.mark.parametrize(("plan", "permutes"), [(WHOLE, 0), (SPLIT, 1), (BOTH, 3)])
def test_a_composite_trains_as_the_function_that_it_stands_for(plan: str, permutes: int) -> None:
    program = check_equal(Centred(), (real(4, 6),), plan)
    for graph in program.graphs().values():
        found = Counter(str(node.op) for node in graph.nodes)
        assert found["mesh::permute"] == permutes
        assert found["mesh::centre"] == (permutes == 0)
        assert not found["mesh::all_gather"]


def test_a_lowering_that_changes_the_layout_is_an_error_of_the_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gathered(self: Centre, context: LoweringContext) -> Node:
        (x,) = context.args
        return context.reshard(x, replicated(x.tensor.shape))

    monkeypatch.setattr(Centre, "lower", gathered)
    with pytest.raises(PassError, match="`mesh::centre` is lowered to"):
        meshwright.compile(Centred(), meshwright.Plan.parse(SPLIT), (real(4, 6).float(),))


def test_an_adjoint_or_a_kernel_that_is_missing_is_named() -> None:
    bare = type("Bare", (Composite,), {"op": Centre.op})()
    with pytest.raises(PassError, match="`mesh::centre` has no adjoint"):
        bare.adjoint(None)
    with pytest.raises(PassError, match="`mesh::centre` has no kernel"):
        bare.bind(None)


@pytest.mark.slow
def test_a_composite_trains_on_real_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    processes = start(Path(toy.__file__), 2)
    assert finish(processes, 100) == ["done\n"] * 2

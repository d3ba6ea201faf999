"""The list of passes, and many plans on one capture."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.compiler.errors import PassError
from meshwright.passes import driver
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
    launcher: Callable[..., Any] = pytest.fail
    found = [driver.compile_captured(captured, plan, launcher=launcher) for plan in plans]
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

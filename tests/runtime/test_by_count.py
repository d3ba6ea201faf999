"""Rows that are exchanged by count, from the graph to the transports."""

from __future__ import annotations

import pytest

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import MeshOp, rewrite
from meshwright.compiler.layout.factors import cut
from meshwright.compiler.placing.check import check
from meshwright.compiler.placing.composite import COMPOSITES
from meshwright.compiler.public import Program
from meshwright.passes.rewriting.rewriter import REWRITES
from tests.runtime import by_count
from tests.runtime.forked import Forked


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (by_count.Visit, by_count.Sorted, by_count.Unsorted):
        monkeypatch.setitem(COMPOSITES, kind.op, kind())
    monkeypatch.setitem(REWRITES, by_count.NAME, by_count.rewritten)


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_go_where_counts_say_and_too_many_are_an_error_on_every_rank(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_count, "maximum", 4 * ranks - 2)
    model, program = by_count.compiled(ranks)
    with program.launch() as run:
        by_count.check(run, model, ranks)


def test_two_processes_exchange_rows_and_both_learn_where_there_is_no_room(forked: Forked) -> None:
    assert forked.outputs("tests.runtime.by_count", 2) == ["done\n"] * 2


def test_the_error_says_which_maximum_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_count, "maximum", 5)
    _, program = by_count.compiled(2)
    with program.launch() as run, pytest.raises(by_count.OverfullError) as caught:
        run.step(*by_count.inputs(2, to_one=True))
    assert str(caught.value) == (
        "8 rows of `` go to the experts of one rank, which has room for 5\n"
        "  4 go to each where they are spread evenly; nothing has changed\n"
        "  help: write `maximum=2` or more in the `experts` statement of ``; without `maximum` all "
        "of them have room"
    )


def test_reports_count_the_most_that_may_be_sent() -> None:
    _, program = by_count.compiled(2)
    sent = [each.bytes for each in program.comm() if each.kind == "exchange_rows"]
    there, back = 4 * 8 * 8, 8 * 8 * 8
    assert sent == [there, back, there, back]
    assert "at most 2.0 KiB sent" in repr(program.comm())


def test_memory_has_room_for_the_most_that_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_count, "maximum", 800)
    arrived = 800 * 8 * 8
    assert by_count.compiled(2)[1].memory().peak > 2 * arrived


def check_cut_otherwise(program: Program) -> None:
    """Check the forward with another layout of what the first exchange gives."""
    graph = program.graphs()["stage0.forward"]
    node = next(each for each in graph.nodes if each.op == MeshOp("exchange_rows"))

    def changed(builder, each, mapping):
        layout = node.placed.with_dims((cut(16), cut(8, "ep"))) if each is node else each.layout
        return builder.copy(each, mapping, layout=layout)

    check(rewrite(graph, changed), "a pass")


def test_rows_that_are_cut_otherwise_afterwards_are_a_bug_of_the_pass() -> None:
    _, program = by_count.compiled(2)
    with pytest.raises(PassError, match="`exchange_rows` over `ep` takes rows from"):
        check_cut_otherwise(program)

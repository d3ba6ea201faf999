"""The pass `overlap`: collectives start as early as their operands allow."""

from __future__ import annotations

import meshwright
from meshwright.compiler.graph.ir import Graph
from meshwright.passes import overlap as passed
from meshwright.passes.overlap import overlap
from tests.passes.examples import Lm, Mlp, labelled, rows
from tests.passes.stages import check_documented, shown, stages

PLAN = "mesh dp=2\ndata tokens, targets over dp\n"


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def test_the_docstring_shows_a_count_of_labels_before_and_after() -> None:
    before = stages(Lm(), labelled(), PLAN)["partition"]
    listed = "embedding", "linear", "ne", "sum_1", "all_reduce", "div"
    check_documented(passed, shown(before, *listed), shown(overlap(before), *listed))


def test_the_same_nodes_are_left_in_an_order_that_runs() -> None:
    before = stages(Lm(), labelled(), PLAN)["bucket"]
    after = overlap(before)
    assert sorted(names(after)) == sorted(names(before))
    seen = set()
    for node in after.nodes:
        assert set(node.operands()) <= seen
        seen.add(node)


def test_a_bucket_is_reduced_before_the_rest_of_the_backward() -> None:
    plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp\n")
    backward = meshwright.compile(Mlp(), plan, example=rows()).graphs()["stage0.backward"]
    found = names(backward)
    bucket = next(name for name in found if name.startswith("bucket"))
    assert found[found.index(bucket) + 1].startswith("all_reduce")

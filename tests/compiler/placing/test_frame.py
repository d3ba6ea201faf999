"""No operator of a graph's frame is exempt from the check: a wrong one of each kind is refused."""

from __future__ import annotations

import pytest
import torch

import meshwright as mw
from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import Graph, MeshOp, Node, Op, TensorType, rewrite
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.placing.check import check, check_all
from tests.passes.examples import Mlp, rows
from tests.passes.stages import stages

PLAN = "mesh dp=2, tp=2\ndata x over dp\ncolumns up over tp\nrows down over tp\n"
FRAME = ("input", "bucket", "bucket_item")


@pytest.fixture(scope="module")
def joint() -> Graph:
    return stages(Mlp(), rows(), PLAN)["bucket"]


def changed(graph: Graph, op: Op, **fields: object) -> Graph:
    """The graph with these fields of its first node of `op` replaced."""
    first = next(node for node in graph.nodes if node.op == op)

    def change(builder, node, mapping):  # type: ignore[no-untyped-def]  # as `rewrite` calls it
        return builder.copy(node, mapping, **fields) if node is first else None

    return rewrite(graph, change)


def first(graph: Graph, name: str) -> Node:
    return next(node for node in graph.nodes if node.op == MeshOp(name))


def test_a_right_graph_passes(joint: Graph) -> None:
    check(joint, "bucket")
    assert "tp" in first(joint, "bucket").placed.split_axes


@pytest.mark.parametrize("name", FRAME)
def test_a_wrong_layout_of_each_operator_of_the_frame_is_refused(joint: Graph, name: str) -> None:
    node = first(joint, name)
    wrong = replicated(node.tensor.shape).add_partial(["tp"])
    with pytest.raises(PassError, match=f"after `test`, `{node.name}` is"):
        check(changed(joint, node.op, layout=wrong), "test")


@pytest.mark.parametrize("name", FRAME)
def test_a_wrong_type_of_each_operator_of_the_frame_is_refused(joint: Graph, name: str) -> None:
    node = first(joint, name)
    type = TensorType((*node.tensor.shape[:-1], node.tensor.shape[-1] * 2), torch.float16)
    with pytest.raises(PassError, match=f"after `test`, `{node.name}` is"):
        check(changed(joint, node.op, type=type), "test")


def test_what_is_saved_arrives_as_it_was() -> None:
    program = mw.compile(Mlp(), mw.Plan.parse(PLAN), rows())
    graphs = list(program.graphs().values())
    check_all(graphs, "test", set())
    *others, backward = graphs
    node = first(backward, "saved")
    wrong = replicated(node.tensor.shape).add_partial(["dp", "tp"])
    with pytest.raises(PassError, match=f"`{node.name}` is"):
        check_all([*others, changed(backward, node.op, layout=wrong)], "test", set())

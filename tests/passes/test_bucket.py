"""The pass `bucket`: many gradients, one flat buffer and one all-reduce."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from meshwright.compiler.graph.ir import OutputKind
from meshwright.passes import bucket as passed
from meshwright.passes.bucket import bucketed
from tests.passes.examples import Mlp, rows
from tests.passes.stages import check_documented, shown, stages

PLAN = "mesh dp=2\ndata x over dp\nshard x [b@dp, d]\n"


def test_the_docstring_shows_two_gradients_before_and_after() -> None:
    model = Mlp()
    model.up.requires_grad_(False)
    found = stages(model, rows(), "mesh dp=2\ndata x over dp\n")
    reductions = [n.name for n in found["lower"].nodes if n.name.startswith("all_reduce_")]
    after = ("bucket", "all_reduce_1", "down_weight_grad", "down_bias_grad")
    check_documented(
        passed, shown(found["lower"], *reductions[-2:]), shown(found["bucket"], *after)
    )


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().sum()


def test_buckets_are_filled_in_the_order_of_the_backward_and_closed_when_full() -> None:
    joint = stages(Deep(), (torch.randn(8, 16),), "mesh dp=2\ndata x over dp\n")["lower"]
    found = bucketed(joint, limit=16 * 16 * 4 * 2)
    buckets = [node for node in found.nodes if node.op.name == "bucket"]  # type: ignore[union-attr]
    assert [node.tensor.shape[0] for node in buckets] == [528, 544, 16]
    labels = [o.label for o in found.outputs if o.node.args and o.node.args[0] in found.nodes]
    assert sum(label.startswith("gradient:layers") for label in labels) == 8


def test_gradients_that_need_no_reduction_are_laid_out_in_a_buffer_too() -> None:
    found = stages(Mlp(), rows(), "mesh tp=2\ncolumns up over tp\nrows down over tp\n")["bucket"]
    assert {str(o.node.op) for o in found.outputs_of(OutputKind.GRADIENT)} == {"mesh::bucket_item"}

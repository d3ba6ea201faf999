"""`deliver`: every stage has what it returns, and what no parameter feeds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.compiler.graph.ir import Phase
from meshwright.passes import deliver
from tests.passes.stages import check_documented, shown, stages


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        keep = mask.float()
        return (self.down(self.up(x) * keep) * keep).sum()


def test_a_mask_is_computed_where_it_is_used_and_every_stage_has_the_loss() -> None:
    example = torch.randn(8, 16), torch.ones(8, 1) > 0
    found = stages(Masked(), example, "mesh pp=2\nstages at down over pp\n")
    names = "to_copy", "mul", "transfer", "mul_1", "sum"
    check_documented(
        deliver,
        shown(found["loop"], *names),
        shown(found["deliver"], *names, "to_copy_1", "transfer_2"),
    )


class Shown(Masked):
    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": super().forward(x, mask), "keep": mask.float()}


def test_an_output_that_no_parameter_feeds_is_computed_in_each_stage_and_not_sent() -> None:
    example = torch.randn(8, 16), torch.ones(8, 1) > 0
    plan = mw.Plan.parse("mesh pp=2\nstages at down over pp\n")
    program = mw.compile(Shown(), plan, example, outputs=["keep"])
    values = program.transfers.values.items()
    sent = [node for link, nodes in values if link.target_phase is Phase.RESULTS for node in nodes]
    assert [node.tensor.shape for node in sent] == [()], "the loss alone"
    _, keep = program.launch().step(*example)
    assert keep.equal(example[1].float())

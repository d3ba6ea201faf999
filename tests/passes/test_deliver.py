"""`deliver`: every stage has what it returns, and what no parameter feeds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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

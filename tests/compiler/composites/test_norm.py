"""The composite `norm` where its last dim is split."""

from __future__ import annotations

from torch import Tensor, nn

from meshwright.compiler.composites import norm
from tests.models import real
from tests.passes.stages import check_documented, shown, stages


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.ln, self.down = nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = self.down(self.ln(self.up(x))).square().sum()
        return loss


def test_the_docstring_shows_a_norm_before_and_after() -> None:
    plan = "mesh tp=2\ncolumns up over tp\nrows down over tp\n"
    found = stages(Normed(), (real(8, 4).float(),), plan)
    check_documented(
        norm,
        shown(found["differentiate"], "norm"),
        shown(found["lower"], "norm_stats", "all_gather_replicated", "norm_finish"),
    )

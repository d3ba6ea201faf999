"""One run, several programs: other modes and inputs may use less of a model than training does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw

CLASSES, ROWS, FEATURES = 12, 8, 4


class Helped(nn.Module):
    """A head that helps only in training, and targets that only the loss needs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.helper = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> dict[str, Tensor]:
        h = self.up(x).tanh()
        logits = self.head(h)
        if targets is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits, targets)
        if self.training:
            loss = loss + F.cross_entropy(self.helper(h), targets)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("helper", ["rows helper over tp", "shard helper -> [b, c]"])
def test_modules_and_inputs_that_only_training_uses_are_named_by_its_plan(helper: str) -> None:
    torch.manual_seed(0)
    plan = f"mesh dp=2, tp=2\ndata x, targets over dp\ncolumns up over tp\n{helper}"
    model = Helped().double()
    x = torch.randn(ROWS, FEATURES, dtype=torch.float64)
    targets = torch.randint(0, CLASSES, (ROWS,))
    run = mw.compile(model, mw.Plan.parse(plan), example={"x": x, "targets": targets}).launch()
    run.step(x=x, targets=targets)
    wanted = model.eval()(x, targets)
    torch.testing.assert_close(run.evaluate(x=x, targets=targets), wanted["loss"])
    torch.testing.assert_close(run.forward(x=x)["logits"], wanted["logits"])


def test_a_program_of_its_own_still_refuses_inputs_that_it_does_not_have() -> None:
    plan = mw.Plan.parse("mesh dp=2\ndata x, targets over dp")
    with pytest.raises(mw.PlanError, match="`targets` matches nothing"):
        mw.compile(Helped(), plan, example={"x": torch.randn(ROWS, FEATURES)}, mode="infer")

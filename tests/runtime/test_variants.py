"""One run, several programs: other modes and inputs may use less of a model than training does."""

from __future__ import annotations

import copy
from collections.abc import Callable

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


class Normed(nn.Module):
    """A batch norm, which its mode decides, and a setting that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.power = 2

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)) ** self.power).square().mean()


def _retie(model: nn.Module) -> None:
    model.down.weight = model.up.weight


@pytest.mark.parametrize(
    ("before_launch", "change"),
    [
        (True, lambda model: model.eval()),
        (False, lambda model: model.eval()),
        (False, lambda model: model.requires_grad_(False)),
        (False, lambda model: setattr(model, "power", 3)),
        (False, lambda model: setattr(model, "down", nn.Identity())),
        (False, _retie),
    ],
)
def test_what_is_compiled_later_is_of_the_model_as_it_was(
    before_launch: bool, change: Callable[[nn.Module], object]
) -> None:
    torch.manual_seed(0)
    model = Normed().double()
    model.down.bias.requires_grad_(False)
    reference, x = copy.deepcopy(model), torch.randn(8, 4, dtype=torch.float64)
    program = mw.compile(model, mw.Plan.parse("mesh dp=2\ndata x over dp"), example=(x,))
    if before_launch:
        change(model)
    run = program.launch(new_shapes="compile")
    change(model)
    changed = [(module, module.training) for module in model.modules()]
    wanted = reference(x[:4])
    wanted.backward()
    torch.testing.assert_close(run.step(x[:4]), wanted.detach())
    found = run.gradients()
    assert "down.bias" not in found
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad)
    torch.testing.assert_close(run.evaluate(x), reference.eval()(x).detach())
    assert changed == [(module, module.training) for module in model.modules()]


def test_a_run_starts_from_the_weights_that_the_model_has_when_it_is_launched() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Normed().double()
    x = torch.randn(8, 4, dtype=torch.float64)
    program = mw.compile(model, mw.Plan.parse("mesh dp=2\ndata x over dp"), example=(x,))
    for trained in (Normed().double(), Normed().double()):
        model.load_state_dict(trained.state_dict(), assign=True)
        torch.testing.assert_close(program.launch().step(x), trained(x).detach())
    model.down = nn.Linear(2, 2)
    with pytest.raises(mw.RunError, match=r"no `down.weight` of shape \[4, 4\]"):
        program.launch()


def test_weights_that_are_no_longer_tied_at_launch_are_refused_unless_they_are_equal() -> None:
    model = Normed()
    _retie(model)
    x = torch.randn(8, 4)
    program = mw.compile(model, mw.Plan.parse("mesh dp=2\ndata x over dp"), example=(x,))
    model.down.weight = nn.Parameter(model.up.weight.detach().clone())
    torch.testing.assert_close(program.launch().step(x), model(x).detach())
    with torch.no_grad():
        model.down.weight.zero_()
    with pytest.raises(mw.RunError, match=r"`up.weight` and `down.weight` were one tensor"):
        program.launch()

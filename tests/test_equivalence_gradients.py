"""Gradients are eager mode's wherever a model says something about them: stops, ties, losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright import CaptureError
from tests.equivalence import check_equal, implicit_gathers
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, Mlp, real, rows, tokens

PLAN = "mesh dp=2, tp=2\ndata x over dp\ncolumns up over tp\nrows down over tp\n"


class Stopped(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        with torch.no_grad():
            scale = 1 + self.down(h).abs().mean(-1, keepdim=True)
        return (self.down(h) / scale + self.down(h).detach()).square().mean()


def test_no_grad_regions_and_detach_stop_gradients() -> None:
    check_equal(Stopped(), rows, PLAN)


class Written(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h, total = F.gelu(self.up(x)), torch.zeros_like(x[..., 0])
        swapped = torch.zeros_like(h)
        swapped[..., : h.shape[-1] // 2] = h[..., h.shape[-1] // 2 :]
        for part in self.down(swapped).unbind(-1):
            total += part
        target = F.one_hot(self.down(h).argmax(-1), x.shape[-1]).to(h.dtype)
        target -= self.down(h).softmax(-1)
        return total.square().mean() + target.square().mean()


def test_what_is_written_into_zeros_keeps_its_gradient() -> None:
    check_equal(Written(), rows, PLAN)
    check_equal(Written(), rows, "mesh dp=4\ndata x over dp\n")


class Diagonals(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).flatten(0, -2) * 1
        h.fill_diagonal_(2.0)
        h.as_strided((4,), (h.shape[1] + 1,), 1).mul_(3)
        return h.square().mean() + self.down(h).square().mean()


def test_what_is_written_through_strides_stops_its_gradient_and_no_other() -> None:
    check_equal(Diagonals(), rows, "mesh dp=2\ndata x over dp\nallow replicate **\n")


@pytest.mark.parametrize(
    "frozen", [["up.weight", "down.bias"], ["up.weight", "up.bias"], ["down.weight"]]
)
def test_frozen_parameters_have_no_gradient_and_stay(frozen: list[str]) -> None:
    model = Mlp()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    check_equal(model, rows, PLAN)


class Tied(nn.Module):
    """An embedding tied to a head with a bias, whose loss is reduced in any way."""

    def __init__(self, vocab: int = 97, tied: bool = True, **options: Any) -> None:
        super().__init__()
        self.wte, self.mid = nn.Embedding(vocab, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, vocab)
        if tied:
            self.head.weight = self.wte.weight
        weights = torch.rand(vocab) + 0.5 if options.pop("weighted", False) else None
        self.register_buffer("weights", weights)
        self.options = options

    def forward(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.mid(self.wte(tokens)))).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), weight=self.weights, **self.options)
        if loss.dim():
            loss = (loss * torch.linspace(0, 1, loss.numel(), dtype=loss.dtype)).sum()
        return {"loss": loss, "logits": logits}


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weighted": True},
    "weighted and smoothed": {"weighted": True, "label_smoothing": 0.2},
    "summed": {"reduction": "sum"},
    "row by row": {"reduction": "none", "weighted": True},
    "another ignored label": {"ignore_index": 3},
    "untied": {"tied": False, "label_smoothing": 0.1},
}
VOCAB = "mesh dp=2, tp=2\ndata tokens, targets over dp\nvocab wte, head over tp\n"


@pytest.mark.parametrize("name", LOSSES)
def test_losses_over_a_split_vocabulary_that_does_not_divide(name: str) -> None:
    torch.manual_seed(0)
    options = LOSSES[name]

    def batch() -> tuple[Tensor, Tensor]:
        inputs, targets = tokens(97)
        ignored = options.get("ignore_index", -100)
        return inputs, torch.where(targets == -100, ignored, targets)

    program = check_equal(Tied(**options), batch, VOCAB, outputs=["logits"])
    assert program.parameters["wte.weight"].padded_shape == (98, 16)
    assert implicit_gathers(program) == []


@pytest.mark.parametrize("name", ["plain", "smoothed", "weighted"])
def test_a_vocabulary_is_padded_far_where_ranks_are_many(name: str) -> None:
    plan = "mesh dp=2, tp=8\ndata tokens, targets over dp\nvocab wte, head over tp\n"
    check_equal(Tied(vocab=17, **LOSSES[name]), lambda: tokens(17), plan)


@pytest.mark.parametrize("plan", [VOCAB, "mesh dp=8\ndata tokens, targets over dp\n"])
def test_a_rank_may_have_no_label_that_counts(plan: str) -> None:
    def batch() -> tuple[Tensor, Tensor]:
        inputs, targets = tokens(97)
        targets[:4] = -100
        return inputs, targets

    check_equal(Tied(), batch, plan)


def test_tied_weights_have_one_gradient_under_both_names() -> None:
    model, batch = Tied().double(), tokens(97)
    run = meshwright.compile(model, meshwright.Plan.parse(VOCAB), example=batch).launch()
    run.step(*batch)
    gradients = run.gradients()
    assert torch.equal(gradients["wte.weight"], gradients["head.weight"])
    assert len(list(run.parameters())) == 4 * len(list(model.parameters()))


class Soft(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.head, self.options = nn.Linear(16, 12), options

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x), y, **self.options).sum()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}])
def test_targets_may_be_probabilities(options: dict[str, Any]) -> None:
    plan = "mesh dp=2, tp=2\ndata x, y over dp\nvocab head over tp\n"
    program = check_equal(Soft(**options), lambda: (real(8, 16), real(8, 12).softmax(-1)), plan)
    assert implicit_gathers(program) == []


class AnyLoss(nn.Module):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(16, 4), loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.head(x), y)


@pytest.mark.parametrize(
    "loss",
    [
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy_with_logits,
        lambda x, y: F.kl_div(x.log_softmax(-1), y, reduction="batchmean"),
        lambda x, y: F.binary_cross_entropy(torch.sigmoid(x), y),
        lambda x, y: F.nll_loss(x.log_softmax(-1), y.argmax(-1)),
        lambda x, y: torch.logsumexp(x, -1).mean() + x.var(0).sum() + x.softmax(-1).std(),
    ],
)
def test_any_loss_of_torch_is_one_over_the_whole_batch(loss: Any) -> None:
    program = check_equal(
        AnyLoss(loss),
        lambda: (real(8, 16), torch.rand(8, 4, dtype=torch.float64)),
        "mesh dp=4\ndata x, y over dp\n",
    )
    assert implicit_gathers(program) == []


def cubed(x: Tensor) -> Tensor:
    return x**3


cube = meshwright.custom(
    cubed, rule="... -> ...", vjp=lambda grads, inputs, outputs: grads[0] * 3 * inputs[0] ** 2
)


class Custom(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(cube(self.up(x))).square().mean()


def test_a_registered_function_trains_with_its_own_vjp_and_rule() -> None:
    program = check_equal(Custom(), rows, PLAN)
    assert implicit_gathers(program) == []


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StraightThrough(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(Round.apply(self.up(x))).square().mean()


class Hooked(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h.register_hook(lambda grad: grad * 2)
        return self.down(h).square().mean()


def test_a_custom_function_trains_with_its_own_backward() -> None:
    check_equal(StraightThrough(), rows, PLAN)


def test_a_hook_that_export_would_lose_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="hook"):
        meshwright.compile(Hooked(), meshwright.Plan.parse(PLAN), example=rows())


DROPOUT_PLANS = {
    "data": "mesh dp=4\n" + GPT_DATA,
    "tensor": "mesh tp=4\n" + GPT_TENSOR,
    "data-tensor": "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR,
    "sequence": "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + "sequence blocks.* over tp\n",
}


def dropout_run(plan: str) -> dict[str, Tensor]:
    """Losses and gradients of two steps of a GPT with dropout."""
    torch.manual_seed(0)
    model, batches = Gpt(p=0.2).double(), [tokens(), tokens()]
    program = meshwright.compile(model, meshwright.Plan.parse(plan), example=batches[0])
    run = program.launch(seed=7)
    found: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        found[f"loss {i}"] = run.step(*batch)
        found |= {f"{name} {i}": grad.clone() for name, grad in run.gradients().items()}
    return found


def test_dropout_draws_the_same_numbers_under_every_plan() -> None:
    reference = dropout_run("mesh dp=1, tp=1\n" + GPT_DATA)
    assert reference["loss 0"] != reference["loss 1"]
    for plan in DROPOUT_PLANS.values():
        found = dropout_run(plan)
        assert found.keys() == reference.keys()
        for name, value in reference.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.dropout(x * self.scale, 0.3)
        return {"loss": y.sum(), "y": y}


def test_dropout_keeps_the_share_that_it_should_and_scales_it() -> None:
    model, batch = Dropped().double(), (torch.ones(256, 64, dtype=torch.float64),)
    plan = meshwright.Plan.parse("mesh dp=4, tp=2\ndata x over dp\nshard scale [d@tp]\n")
    run = meshwright.compile(model, plan, example=batch, outputs=["y"]).launch()
    _, y = run.step(*batch)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.7}
    kept = (y != 0).double()
    assert abs(kept.mean().item() - 0.7) < 0.015
    torch.testing.assert_close(run.gradients()["scale"], y.sum(0))
    assert len({tuple(row) for row in kept.tolist()}) == 256

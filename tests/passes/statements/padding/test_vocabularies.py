"""The pass `pad`: a vocabulary that does not divide is stored padded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.passes.statements.padding import vocabularies
from tests.equivalence import check_equal, implicit_gathers
from tests.passes.examples import Lm, labelled
from tests.passes.stages import check_documented, shown, stages

PLAN = "mesh tp=2\nvocab wte, head over tp\n"


def test_the_docstring_shows_a_head_before_and_after() -> None:
    found = stages(Lm(97), labelled(97), PLAN)
    names = "head_weight", "linear", "cross_entropy"
    check_documented(vocabularies, shown(found["normalise"], *names), shown(found["pad"], *names))


def test_a_vocabulary_that_divides_is_left_alone() -> None:
    found = stages(Lm(96), labelled(96), PLAN)
    assert found["pad"] is found["shard"]


def test_padding_is_nowhere_to_be_seen() -> None:
    torch.manual_seed(0)
    model = Lm(97).double()
    run = meshwright.compile(
        model, meshwright.Plan.parse(PLAN), example=labelled(97), outputs=()
    ).launch()
    run.step(*labelled(97))
    assert run.state_dict()["wte.weight"].shape == run.gradients()["wte.weight"].shape == (97, 16)
    run.load_state_dict(model.state_dict())
    for rank in run.states:
        grad = rank.parameters["head.weight"].grad
        assert grad is not None
        if rank.coords["tp"] == 1:
            assert grad[-1].abs().max() == 0
            assert rank.parameters["head.weight"][-1].abs().max() == 0


class Scores(nn.Module):
    """Every kind of use of padded values: alone, reduced, joined, sliced, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.tanh(self.head(self.wte(tokens)) * 2)
        first = logits[..., :3].square().sum() + torch.cat([logits, logits], -1).std()
        table = self.wte.weight.t().matmul(self.head.weight)
        return first + logits.softmax(-1).amax(-1).mean() + table.square().mean()


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_use_but_that_of_single_entries_takes_what_is_not_padding(ranks: int) -> None:
    def batch() -> tuple[Tensor]:
        return (torch.randint(0, 7, (3, 5)),)

    check_equal(Scores(), batch, f"mesh tp={ranks}\nvocab wte, head over tp\n")


def test_the_largest_logit_may_be_of_any_sign() -> None:
    class Negative(Lm):
        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.wte(tokens)) - 100, targets)

    check_equal(Negative(13), lambda: labelled(13), "mesh tp=4\nvocab wte, head over tp\n")


class Shifted(Lm):
    """Logits with a bias of the model's own, as BART's, beside other operands of every kind."""

    def __init__(self, vocab: int) -> None:
        super().__init__(vocab)
        self.register_buffer("shift", torch.randn(1, vocab))
        self.register_buffer("scale", torch.rand(vocab) + 1)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        h = self.wte(tokens)
        logits = (self.head(h) + self.shift) / self.scale
        logits = logits - logits.detach() * 0.5 + h.mean(-1, keepdim=True)
        return F.cross_entropy(logits, targets)


def test_logits_with_a_bias_or_a_scale_of_their_own_stay_split() -> None:
    torch.manual_seed(0)
    model = Shifted(13).double()
    program = check_equal(model, lambda: labelled(13), "mesh tp=2\nvocab wte, head over tp\n")
    assert implicit_gathers(program) == []


Use = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A loss of hidden values `[8, 16]`, logits `[8, 13]` and a table `[13, 16]`."""


class Used(nn.Module):
    """A vocabulary and one use of it."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.wte, self.head, self.use = nn.Embedding(13, 16), nn.Linear(16, 13), use

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.wte(tokens)
        return self.use(h, self.head(h), self.wte.weight)


def _loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(8) % 13)


APART: dict[str, Use] = {
    "sigmoid": lambda h, x, w: _loss(x.sigmoid()),
    "cap": lambda h, x, w: _loss(x.clamp(-1, 1) ** 3),
    "exp": lambda h, x, w: _loss(F.silu(x).exp()),
    "mask": lambda h, x, w: _loss(x.masked_fill(x > 1, 0.5)),
    "choice": lambda h, x, w: _loss(torch.where(torch.arange(13) > 4, x, -x * 2)),
    "order": lambda h, x, w: F.cross_entropy(
        x.view(2, 4, 13).permute(0, 2, 1), torch.arange(8).view(2, 4)
    ),
    "rows": lambda h, x, w: _loss(torch.cat([x[4:], x[:4].flip(0)]).cumsum(0)),
    "stack": lambda h, x, w: _loss(torch.stack([x, x.tanh()]).sum(0)),
    "tied": lambda h, x, w: _loss(x + h @ w.exp().t()),
    "normed": lambda h, x, w: _loss(x + F.linear(h, w * (w.square() + 1).sum(1, keepdim=True))),
}
"""Uses in which the entries of the vocabulary stay apart."""

MIXED: dict[str, Use] = {
    "square root": lambda h, x, w: _loss((x.square() + 0.5).sqrt()),
    "quotient": lambda h, x, w: _loss(x / (h @ w.t()).abs()),
    "directions": lambda h, x, w: _loss(x + h @ (w / w.square().sum(1, keepdim=True).sqrt()).t()),
    "logarithm": lambda h, x, w: _loss(x + h @ w.abs().log().t()),
    "log-sum-exp": lambda h, x, w: x.logsumexp(-1).sum() + _loss(x),
    "largest": lambda h, x, w: x.sort(-1)[0][:, -2:].sum() + x.amax(),
    "all entries": lambda h, x, w: x.flatten().square().sum() + w.std(),
    "norm": lambda h, x, w: _loss(F.layer_norm(x, (13,))),
    "joined classes": lambda h, x, w: F.cross_entropy(x.view(4, 26), torch.tensor([1, 14, 12, 25])),
}
"""Uses that reduce over the vocabulary, or that may be infinite where padding is zero."""


@pytest.mark.parametrize("use", [*APART, *MIXED])
def test_padding_changes_nothing_whatever_the_vocabulary_is_used_for(use: str) -> None:
    torch.manual_seed(0)
    model = Used({**APART, **MIXED}[use])
    plan = "mesh tp=2\nvocab wte, head over tp\n"
    batch = (torch.randint(0, 13, (8,)),)
    program = check_equal(model, batch, plan)
    assert (implicit_gathers(program) == []) == (use in APART)
    run = program.launch()
    run.step(*batch)
    for name in ("wte.weight", "head.weight", "head.bias"):
        grad = run.states[1].parameters[name].grad
        assert grad is not None
        assert grad[-1].abs().max() == 0

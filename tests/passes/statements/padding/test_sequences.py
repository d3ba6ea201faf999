"""The pass `pad_sequences`: a sequence that does not divide is padded where it enters a region."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.passes.statements.padding import sequences as passed
from tests.equivalence import check_equal, implicit_gathers
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, real
from tests.passes.examples import Blocks, Body
from tests.passes.stages import check_documented, shown, stages

LINEARS = "columns block.up over tp\nrows block.down over tp\nsequence block over tp\n"


def test_the_docstring_shows_a_region_before_and_after() -> None:
    found = stages(Blocks(), (torch.randn(8, 17, 16),), "mesh tp=2\n" + LINEARS)
    names = "getitem", "linear_1", "add", "sum"
    check_documented(
        passed,
        shown(found["sequence"], *names),
        shown(found["pad_sequences"], *names, "extend", "slice"),
    )


def test_a_sequence_that_divides_is_left_alone() -> None:
    found = stages(Blocks(), (torch.randn(8, 16, 16),), "mesh tp=2\n" + LINEARS)
    assert found["pad_sequences"] is found["sequence"]


@pytest.mark.parametrize(("length", "ranks"), [(17, 2), (17, 3), (17, 4), (5, 4), (1, 2), (1, 4)])
def test_any_length_trains_over_any_number_of_ranks(length: int, ranks: int) -> None:
    model = nn.Sequential(Body(), Body())
    model[0].up, model[0].down = nn.Linear(16, 24), nn.Linear(24, 16)
    plan = f"mesh tp={ranks}\ncolumns 0.up over tp\nrows 0.down over tp\nsequence * over tp\n"
    program = check_equal(model, lambda: (real(2, length, 16),), plan, loss=_mean)
    assert implicit_gathers(program) == []


def _mean(y: Tensor) -> Tensor:
    return y.square().mean()


class ShortGpt(Gpt):
    """With as many positions as tokens are given, and no more."""

    def __init__(self, length: int, p: float = 0.0) -> None:
        super().__init__(p=p)
        self.wpe = nn.Embedding(length, 24)


def short_tokens(length: int = 7) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, 48, (4, length))
    targets[0, : length // 2] = -100
    return torch.randint(0, 48, (4, length)), targets


def test_a_layer_sends_no_more_than_where_the_sequence_divides() -> None:
    plan = "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + "sequence blocks.* over tp\n"
    plan += "vocab wte, head over tp\n"
    odd = check_equal(ShortGpt(7), short_tokens, plan)
    even = meshwright.compile(ShortGpt(8), meshwright.Plan.parse(plan), example=short_tokens(8))
    assert implicit_gathers(odd) == []
    sent = [
        sorted((each.phase, each.kind) for each in program.comm().under("blocks.1"))
        for program in (odd, even)
    ]
    assert sent[0] == sent[1]


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda y: F.dropout(F.dropout(y, 0.5).transpose(0, 1), 0.25),
    "dropout of rows": lambda y: F.dropout(y.flatten(0, 1), 0.5),
    "noise": lambda y: y * torch.rand_like(y) + torch.randn(y.shape, dtype=y.dtype),
    "choices": lambda y: y * torch.bernoulli(y.sigmoid().detach()),
}


@pytest.mark.parametrize("draw", RANDOM)
def test_padding_does_not_change_the_random_numbers(draw: str) -> None:
    class Dropped(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return RANDOM[draw](self.block(x)).square().sum()

    torch.manual_seed(0)
    model, batch = Dropped().double(), (real(4, 5, 16),)
    losses, gradients = [], []
    for plan in ("mesh tp=1\n", "mesh tp=2\n" + LINEARS, "mesh tp=4\n" + LINEARS):
        run = meshwright.compile(model, meshwright.Plan.parse(plan), example=batch).launch()
        losses.append(run.step(*batch))
        gradients.append(run.gradients()["block.up.weight"])
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])


class Uses(nn.Module):
    """A region, and one use of what it gives."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.use = Body(), use
        self.scale = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.use(self.block(x) * self.scale)
        return (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()).sum()


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1),
    "maximum": lambda x: x.amax(1),
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "all but the first": lambda x: x[:, 1:],
    "one in two": lambda x: x[:, ::2],
    "flip": lambda x: x.flip(1) * x,
    "roll": lambda x: x.roll(2, 1) + x,
    "cumulated": lambda x: x.cumsum(1).tanh(),
    "softmax": lambda x: x.softmax(1) * x,
    "normalised over all": lambda x: F.layer_norm(x, x.shape[1:]),
    "scores": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "scores of both": lambda x: torch.einsum("bsd,btd->bst", x, x).relu().sum(2),
    "joined": lambda x: torch.cat([x, x[:, :2]], 1),
    "joined features": lambda x: torch.cat([x, x.tanh()], 2),
    "stacked": lambda x: torch.stack([x, x.exp()], 1),
    "flat": lambda x: x.reshape(-1, 16).log_softmax(-1),
    "flat rows": lambda x: x.flatten(1).tanh(),
    "turned": lambda x: x.transpose(0, 1).reshape(-1, 4).sigmoid().view(5, -1),
    "domain": lambda x: x / x.norm(dim=-1, keepdim=True) + x.square().sum(-1, True).log(),
    "convolution": lambda x: F.conv1d(x.mT, x.new_ones(16, 1, 3), groups=16, padding=1),
    "positions": lambda x: x * torch.arange(5, dtype=x.dtype)[:, None],
    "causal mask": lambda x: (x @ x.mT).masked_fill(torch.ones(5, 5).triu(1).bool(), 0.0).tanh(),
    "sorted": lambda x: x.sort(1).values,
    "largest": lambda x: x.topk(2, 1).values,
    "expanded": lambda x: x[:, :, None].expand(-1, -1, 3, -1),
    "repeated": lambda x: x.repeat(1, 2, 1),
    "unfolded": lambda x: x.unfold(1, 2, 1),
    "written": lambda x: x.clone().index_fill(1, torch.tensor([0, 4]), 0.0),
    "variance": lambda x: x.var(1) + x.std((0, 1)),
    "chosen": lambda x: x[:, torch.tensor([4, 0, 4])],
    "gathered": lambda x: x.gather(1, torch.arange(5).flip(0)[None, :, None].expand(4, 5, 16)),
    "split": lambda x: torch.cat(x.split([2, 3], 1)[::-1], 1).tanh(),
    "windows": lambda x: F.pad(x, (0, 0, 1, 0)).view(4, 2, 3, 16).amax(2),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_no_use_of_a_padded_sequence_sees_the_padding(use: str) -> None:
    torch.manual_seed(0)
    check_equal(Uses(USES[use]), lambda: (real(4, 5, 16),), "mesh tp=2\n" + LINEARS, steps=2)


class TwoLengths(nn.Module):
    """An encoder of 5 and a decoder of 3, which attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Body(), Body()
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.encoder(x), self.decoder(y)
        k, v = self.kv(x).unflatten(-1, (2, 4, 4)).permute(2, 0, 3, 1, 4)
        q = self.q(y).unflatten(-1, (4, 4)).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.decoder(y + self.out(z)).square().mean()


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_regions_of_odd_lengths_attend_to_each_other(ranks: int) -> None:
    plan = f"mesh dp=2, tp={ranks}\ndata x, y over dp\nsequence encoder, decoder over tp\n"
    plan += "columns {encoder,decoder}.up, q over tp\nrows {encoder,decoder}.down, out over tp\n"
    plan += "columns kv over tp as (2 heads hd)\nlet heads = 4\n"
    program = check_equal(TwoLengths(), lambda: (real(4, 5, 16), real(4, 3, 16)), plan)
    assert implicit_gathers(program) == []


def test_regions_over_axes_of_other_sizes_pad_anew() -> None:
    model = nn.Sequential(Body(), Body(), Body())
    plan = "mesh a=2, b=3\nsequence 0 over a\nsequence 1 over b\nsequence 2 over (a, b)\n"
    check_equal(model, lambda: (real(2, 5, 16),), plan, loss=_mean)


def test_a_layout_that_the_plan_writes_inside_a_region_holds_the_padding() -> None:
    model = nn.Sequential(Body(), Body(), Body())
    plan = "mesh tp=2\nsequence * over tp\nshard 0 -> [b, s, d@tp]\nshard 2 <- [b@tp, s, d]\n"
    check_equal(model, lambda: (real(2, 5, 16),), plan, loss=_mean)

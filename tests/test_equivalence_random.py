"""Random operators draw the same numbers under every plan and on every rank, and the right ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as dist
from torch.nn import functional as F

import meshwright
from tests.equivalence import Comparison
from tests.models import real

TENSOR = "columns up over tp\nrows down over tp\n"
ONE = "mesh dp=1\ndata x over dp\n"
PLANS = {
    "data": "mesh dp=2\ndata x over dp\n",
    "tensor": "mesh tp=3\n" + TENSOR,
    "both": "mesh dp=2, tp=2\ndata x over dp\n" + TENSOR,
}

Body = Callable[[Tensor], Tensor]

MADE: dict[str, Body] = {
    "rand": lambda h: torch.rand(8, 6, dtype=h.dtype),
    "rand_like": torch.rand_like,
    "rand, complex": lambda h: torch.rand(8, 6, dtype=torch.complex128).imag,
    "randn": lambda h: torch.randn(8, 6, dtype=h.dtype),
    "randn_like": torch.randn_like,
    "randn, complex": lambda h: torch.randn(8, 6, dtype=torch.complex128).imag,
    "randn of a row": lambda h: torch.randn(6, dtype=h.dtype).expand_as(h),
    "randint": lambda h: torch.randint(5, (8, 6)),
    "randint of a range": lambda h: torch.randint(-3, 5, (8, 6)),
    "randint_like": lambda h: torch.randint_like(h, 5),
    "randint_like of a range": lambda h: torch.randint_like(h, -3, 5),
    "normal of numbers": lambda h: torch.normal(1.0, 2.0, (8, 6)),
    "randperm": lambda h: torch.randperm(8)[:, None].expand(8, 6),
}
FILLED: dict[str, Body] = {
    "normal_": lambda h: torch.empty_like(h).normal_(1, 2),
    "uniform_": lambda h: torch.empty_like(h).uniform_(-1, 3),
    "exponential_": lambda h: torch.empty_like(h).exponential_(2),
    "log_normal_": lambda h: torch.empty_like(h).log_normal_(0, 0.5),
    "cauchy_": lambda h: torch.empty_like(h).cauchy_(1, 2).clamp(-9, 9),
    "geometric_": lambda h: torch.empty_like(h).geometric_(0.3),
    "random_": lambda h: torch.empty_like(h).random_().log1p(),
    "random_ of a size": lambda h: torch.empty_like(h).random_(5),
    "random_ of a range": lambda h: torch.empty_like(h).random_(2, 5),
    "bernoulli_": lambda h: torch.empty_like(h).bernoulli_(0.3),
    "bernoulli_ of a tensor": lambda h: torch.empty_like(h).bernoulli_(h.sigmoid().detach()),
    "bernoulli_ of whole numbers": lambda h: torch.empty(8, 6, dtype=torch.int64).bernoulli_(0.3),
    "what needs a gradient": lambda h: (2 * h).normal_(),
}
DROPPED: dict[str, Body] = {
    "dropout": lambda h: F.dropout(h, 0.3),
    "dropout_": lambda h: F.dropout(2 * h, 0.3, inplace=True),
    "native_dropout": lambda h: sum(torch.native_dropout(h, 0.3, True)),
    "native_dropout, not told to train": lambda h: torch.native_dropout(h, 0.3, None)[0],
    "mask of native_dropout": lambda h: torch.native_dropout(h, 0.3, None)[1],
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.3, True),
    "alpha_dropout of 1": lambda h: F.alpha_dropout(h, 1.0, True),
    "feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h.view(8, 3, 2), 0.3, True),
    "dropout1d": lambda h: F.dropout1d(h.view(8, 3, 2), 0.3),
    "dropout2d": lambda h: F.dropout2d(h.view(8, 3, 2, 1), 0.3),
    "dropout3d": lambda h: F.dropout3d(h.view(8, 3, 2, 1, 1), 0.3, inplace=True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "rrelu_": lambda h: F.rrelu(2 * h, 0.2, 0.4, training=True, inplace=True),
    "rrelu in evaluation": lambda h: F.rrelu(h),
    "gumbel_softmax": F.gumbel_softmax,
    "gumbel_softmax, hard": lambda h: F.gumbel_softmax(h, hard=True),
}
CHOSEN: dict[str, Body] = {
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()),
    "bernoulli of a number": lambda h: torch.bernoulli(h.detach(), 0.3),
    "multinomial": lambda h: h * torch.multinomial(h.softmax(-1), 1),
    "multinomial, twice": lambda h: h[:, :2] * torch.multinomial(h.softmax(-1), 2),
    "multinomial, again": lambda h: h[:, :4] * torch.multinomial(h.softmax(-1), 4, True),
    "multinomial of a row": lambda h: torch.multinomial(h.softmax(-1)[0], 4, True).to(h.dtype),
    "normal": lambda h: torch.normal(h, h.exp()),
    "normal of means": lambda h: torch.normal(h, 2.0),
    "normal of deviations": lambda h: torch.normal(1.0, h.exp()),
    "poisson": lambda h: torch.poisson(h.exp()),
    "binomial": lambda h: torch.binomial(torch.full_like(h, 5.0), h.sigmoid().detach()),
    "standard_gamma": lambda h: torch._standard_gamma(h.exp()),
    "fractional_max_pool2d": lambda h: F.fractional_max_pool2d(h.view(2, 1, 4, 6), 2, (2, 3)),
    "attention": lambda h: F.scaled_dot_product_attention(*(h.view(8, 2, 3),) * 3, dropout_p=0.3),
}
SAMPLED: dict[str, Body] = {
    "normal": lambda h: dist.Normal(h, h.exp()).rsample(),
    "gamma": lambda h: dist.Gamma(h.exp(), h.exp()).rsample().log(),
    "dirichlet": lambda h: dist.Dirichlet(h.exp()).rsample(),
    "beta": lambda h: dist.Beta(h.exp(), h.exp()).rsample(),
    "student": lambda h: dist.StudentT(h.exp() + 3).rsample(),
    "gumbel": lambda h: dist.Gumbel(h, h.exp()).rsample(),
    "laplace": lambda h: dist.Laplace(h, h.exp()).rsample(),
    "categorical": lambda h: dist.Categorical(logits=h).sample()[:, None] * h,
    "straight through": lambda h: dist.OneHotCategoricalStraightThrough(logits=h).rsample(),
    "relaxed": lambda h: dist.RelaxedBernoulli(torch.tensor(0.5), logits=h).rsample(),
    "binomial": lambda h: dist.Binomial(5, logits=h).sample() * h,
    "negative binomial": lambda h: dist.NegativeBinomial(5.0, logits=h).sample() * h,
    "poisson": lambda h: dist.Poisson(h.exp()).sample() * h,
}
GROUPS: dict[str, dict[str, Body]] = {
    "made": MADE,
    "filled": FILLED,
    "dropped": DROPPED,
    "chosen": CHOSEN,
    "sampled": SAMPLED,
}


class Drawing(nn.Module):
    """Two layers with random operators between them, each weighted by its input."""

    def __init__(self, *bodies: Body) -> None:
        super().__init__()
        self.up, self.down, self.bodies = nn.Linear(6, 6), nn.Linear(6, 6), bodies

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        drawn = [body(h) for body in self.bodies]
        total = self.down(F.gelu(h)).square().mean()
        for each in drawn:
            whole = each.to(h.dtype) * h if each.shape == h.shape else each
            total = total + whole.to(h.dtype).square().mean() / len(drawn)
        return total


def train(model: nn.Module, plan: str, batches: list[Tensor]) -> dict[str, Tensor]:
    """All that training gives, by name; what ranks hold copies of is compared to the bit."""
    program = meshwright.compile(
        model, meshwright.Plan.parse(plan + "allow replicate **\n"), (batches[0],)
    )
    run = program.launch(seed=5)
    optimizer, found = run.optimizer(torch.optim.AdamW, lr=1e-2), {}
    for number, batch in enumerate(batches):
        found[f"loss {number}"] = run.step(batch)
        run.check(optimizer)
        found |= {f"gradient {number} of {name}": g for name, g in run.gradients().items()}
        optimizer.step()
        optimizer.zero_grad()
        run.check(optimizer)
    return found | run.state_dict()


def check_same(model: nn.Module, plans: Mapping[str, str]) -> None:
    torch.manual_seed(0)
    model, batches = model.double(), [real(8, 6) for _ in range(3)]
    expected = train(model, ONE, batches)
    for name, plan in plans.items():
        compare, found = Comparison(1e-10), train(model, plan, batches)
        assert set(found) == set(expected)
        for key, value in found.items():
            compare(f"{name}: {key}", value, expected[key])
        compare.report()


@pytest.mark.parametrize("group", GROUPS)
def test_every_rank_draws_what_one_rank_draws(group: str) -> None:
    check_same(Drawing(*GROUPS[group].values()), {"both": PLANS["both"]})


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_plan_draws_what_one_rank_draws(group: str) -> None:
    check_same(Drawing(*GROUPS[group].values()), {k: v for k, v in PLANS.items() if k != "both"})


class Dropping(nn.Module):
    """Means over the batch of what was dropped, drawn or scaled, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.gelu(self.up(x)), 0.4)
        h = h * torch.rand_like(h) + torch.bernoulli(h.detach().sigmoid())
        h = F.dropout1d(h.view(-1, 3, 2), 0.3).flatten(1)
        heads = h.view(-1, 1, 2, 3)
        h = h + F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3).flatten(1)
        return self.down(h).square().mean()


def test_microbatches_and_stored_parts_draw_what_the_whole_batch_draws() -> None:
    plans = {
        "microbatches": ONE + "accumulate 4\n",
        "microbatches, stored split": PLANS["data"] + "accumulate 2\nzero 3 over dp\n",
        "gradients split": PLANS["both"] + "accumulate 2\nzero 2 over dp\n",
    }
    check_same(Dropping(), plans)


class Masked(nn.Module):
    def __init__(self, train: bool | None) -> None:
        super().__init__()
        self.up, self.down, self.train_ = nn.Linear(6, 6), nn.Linear(6, 6), train

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.up(x)
        y, mask = torch.native_dropout(h, 0.3, self.train_)
        return h, y, mask, self.down(y * mask)


@pytest.mark.parametrize("train", [True, False, None])
def test_the_mask_of_a_dropout_says_what_it_kept(train: bool | None) -> None:
    torch.manual_seed(0)
    model, x, first = Masked(train).double(), real(8, 6), None
    for plan in (ONE, *PLANS.values()):
        parsed = meshwright.Plan.parse(plan + "allow replicate **\n")
        found = meshwright.compile(model, parsed, (x,), mode="infer").launch(seed=3).forward(x)
        h, y, mask, _ = found.values()
        torch.testing.assert_close(h, model.up(x).detach())
        torch.testing.assert_close(y, torch.where(mask, h / (0.7 if train is not False else 1), 0))
        assert mask.dtype == torch.bool and mask.all() == (train is False) and mask.any()
        torch.testing.assert_close(found, first := first or found)


def test_evaluations_draw_the_same_numbers_under_every_plan() -> None:
    torch.manual_seed(0)
    model, x = Drawing(torch.randn_like, CHOSEN["bernoulli"]).double(), real(8, 6)
    found = []
    for plan in (ONE, *PLANS.values()):
        run = meshwright.compile(model, meshwright.Plan.parse(plan), (x,), mode="eval").launch()
        found.append([float(run.evaluate(x)) for _ in range(2)])
        run.check()
    assert found == [pytest.approx(found[0], abs=1e-12)] * 4


class Padded(nn.Module):
    """Random operators in a region whose sequence does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Drawing(torch.randn_like, lambda h: F.dropout(h, 0.3), torch.rand_like)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.view(2, 4, 6).repeat(1, 2, 1)[:, :7])


def test_a_padded_sequence_draws_the_same_numbers() -> None:
    plan = "mesh tp=2\nsequence block over tp\n"
    check_same(Padded(), {"sequence": plan.replace("block", "block.up")})


class Heads(nn.Module):
    """Random operators on the segments and heads of a split projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 36), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.qkv(x.view(2, 4, 6))
        h = F.dropout(h + 0.1 * torch.randn_like(h), 0.2, inplace=True)
        q, k, v = h.view(2, 4, 3, 6, 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)
        mixed = mixed * torch.rand_like(mixed)
        return self.proj(mixed.transpose(1, 2).flatten(2)).square().mean()


def test_heads_draw_the_same_numbers() -> None:
    split = "columns qkv over tp as (3 heads hd)\nrows proj over tp\nlet heads = 6\n"
    check_same(Heads(), {"3": "mesh tp=3\n" + split, "6": "mesh tp=6\n" + split})


class Classes(nn.Module):
    """Random operators on scores of a vocabulary that is split and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, 0] * 100).long() % 11
        scores = self.head(F.dropout(self.wte(tokens), 0.2))
        noisy = scores + 0.1 * torch.randn(8, 11, dtype=x.dtype)
        picked = scores.gather(1, torch.multinomial(scores.softmax(-1), 1)).mean()
        return (
            F.cross_entropy(noisy, tokens) + F.gumbel_softmax(scores, 2.0).amax(1).mean() + picked
        )


def test_a_padded_vocabulary_draws_the_same_numbers() -> None:
    check_same(Classes(), {"vocab": "mesh tp=2\nvocab wte, head over tp\n"})


ELEMENTWISE = [MADE["rand"], torch.randn_like, *list(FILLED.values())[:8]]
ELEMENTWISE += [CHOSEN[name] for name in ("bernoulli", "normal", "poisson", "standard_gamma")]
ELEMENTWISE.append(lambda h: F.dropout2d(h[..., None, None], 0.3))


@pytest.mark.parametrize("plan", PLANS)
def test_drawing_moves_nothing(plan: str) -> None:
    torch.manual_seed(0)
    counts = []
    for bodies in ((), ELEMENTWISE):
        model, parsed = Drawing(*bodies).double(), meshwright.Plan.parse(PLANS[plan])
        program = meshwright.compile(model, parsed, (real(8, 6),))
        assert not any(movement.implicit for movement in program.movements)
        counts.append(program.comm().counts())
    assert counts[0].keys() == counts[1].keys()


def test_a_rank_makes_its_own_part_alone() -> None:
    plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp\n")
    model = Drawing(MADE["rand"], lambda h: F.dropout2d(h[..., None], 0.3)).double()
    program = meshwright.compile(model, plan, (real(8, 6),))
    assert "random: f64[8@dp, 6]" in str(program.graph("stage0.forward"))
    assert "full: f64[8@dp, 6, 1]" in str(program.graph("stage0.forward"))


# -- the numbers themselves ------------------------------------------------------------------------

SIZE = (256, 128)


def weights(*each: float) -> Tensor:
    return torch.tensor(each, dtype=torch.float64).expand(SIZE[0], len(each))


DISTRIBUTIONS: dict[str, tuple[Body, float, float]] = {
    "rand": (torch.rand_like, 0.5, 1 / 12),
    "randn": (torch.randn_like, 0, 1),
    "complex": (lambda h: torch.randn(SIZE, dtype=torch.complex128).real, 0, 0.5),
    "randint": (lambda h: torch.randint(-1, 4, SIZE), 1, 2),
    "normal_": (lambda h: torch.empty_like(h).normal_(1, 2), 1, 4),
    "normal": (lambda h: torch.normal(h + 1, 2 * torch.ones_like(h)), 1, 4),
    "normal of numbers": (lambda h: torch.normal(1.0, 2.0, SIZE), 1, 4),
    "uniform_": (lambda h: torch.empty_like(h).uniform_(-1, 3), 1, 4 / 3),
    "exponential_": (lambda h: torch.empty_like(h).exponential_(2), 0.5, 0.25),
    "log_normal_": (lambda h: torch.empty_like(h).log_normal_(1, 2).log(), 1, 4),
    "cauchy_": (lambda h: (torch.empty_like(h).cauchy_(1, 2) > 3).to(h.dtype), 0.25, 3 / 16),
    "geometric_": (lambda h: torch.empty_like(h).geometric_(0.25), 4, 12),
    "random_": (lambda h: torch.empty_like(h).random_() / 2**53, 0.5, 1 / 12),
    "bernoulli": (lambda h: torch.bernoulli(h + 0.3), 0.3, 0.21),
    "bernoulli_": (lambda h: torch.empty_like(h).bernoulli_(0.3), 0.3, 0.21),
    "dropout_": (lambda h: F.dropout(h + 1, 0.2, True, inplace=True), 1, 0.25),
    "dropout": (lambda h: F.dropout(h + 1, 0.2, True), 1, 0.25),
    "dropout1d": (lambda h: F.dropout1d(h[..., None] + 1, 0.2, True), 1, 0.25),
    "alpha_dropout": (lambda h: F.alpha_dropout(torch.randn_like(h), 0.2, True), 0, 1),
    "rrelu": (lambda h: F.rrelu(h - 1, 0.1, 0.3, True), -0.2, 0.04 / 12),
    "poisson": (lambda h: torch.poisson(h + 3), 3, 3),
    "binomial": (lambda h: torch.binomial(h + 20, h + 0.3), 6, 4.2),
    "gamma": (lambda h: torch._standard_gamma(h + 2), 2, 2),
    "gumbel": (lambda h: dist.Gumbel(h, h + 1).sample(), 0.5772, 1.645),
    "first of two": (
        lambda h: torch.multinomial((h + 0.5)[:, :2], 2)[:, :1].expand(h.shape), 0.5, 0.25
    ),
    "multinomial": (lambda h: torch.multinomial(weights(1, 2, 1), 1), 1, 0.5),
    "multinomial, again": (lambda h: torch.multinomial(weights(1, 0, 1), 128, True), 1, 1),
}  # fmt: skip


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE[1], dtype=torch.float64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = x + self.weight
        return {name: body(h).double() for name, (body, *_) in DISTRIBUTIONS.items()}


@pytest.fixture(scope="module")
def draws() -> list[dict[str, Tensor]]:
    """What two calls draw."""
    plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp\nallow replicate **\n")
    x = torch.zeros(SIZE, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "eval", lambda module: module)
        run = meshwright.compile(Drawn(), plan, (x,), mode="infer").launch(seed=3)
    return [run.forward(x), run.forward(x)]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_numbers_have_the_mean_and_variance_of_their_distribution(
    name: str, draws: list[dict[str, Tensor]]
) -> None:
    _, mean, variance = DISTRIBUTIONS[name]
    numbers = draws[0][name]
    count = 256 if name in ("first of two", "multinomial") else numbers.numel()
    fourth = (numbers - numbers.mean()).pow(4).mean()
    assert abs(numbers.mean() - mean) < 5 * (variance / count) ** 0.5
    assert abs(numbers.var() - variance) < 5 * ((fourth + variance**2) / count) ** 0.5


def test_calls_and_operators_are_independent(draws: list[dict[str, Tensor]]) -> None:
    whole = [name for name, x in draws[0].items() if x.numel() == math.prod(SIZE)]
    rows = [draw[name].flatten() for draw in draws for name in whole if name != "first of two"]
    correlation = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.prod(SIZE) ** 0.5


def test_a_choice_without_replacement_takes_each_class_once() -> None:
    class Shuffled(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.multinomial(x, 6), torch.randperm(100)

    plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp\n")
    x = torch.rand(8, 6)
    run = meshwright.compile(Shuffled(), plan, (x,), mode="infer").launch()
    rows, order = run.forward(x).values()
    assert rows.sort().values.equal(torch.arange(6).expand(8, 6))
    assert order.sort().values.equal(torch.arange(100))
    assert not order.equal(torch.arange(100))


# -- gradients and steps -------------------------------------------------------------------------


class Bare(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.weight, self.body = nn.Parameter(real(8, 6)), body

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        drawn = self.body(self.weight)
        return (drawn * x).sum(), drawn


def _one_step(body: Body, plan: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, input, what was drawn, and the weight's gradient."""
    torch.manual_seed(0)
    model, x = Bare(body), real(8, 6)
    program = meshwright.compile(model, meshwright.Plan.parse(plan), (x,), loss="0", outputs=("1",))
    run = program.launch()
    _, drawn = run.step(x)
    run.check()
    return model.weight.detach(), x, drawn, run.gradients()["weight"]


SPLIT = "mesh tp=2\nshard weight [a, b@tp]\n"


@pytest.mark.parametrize(
    "name", ["bernoulli", "normal", "normal of means", "normal of deviations", "poisson"]
)
def test_what_torch_treats_as_a_constant_has_gradients_of_zeros(name: str) -> None:
    *_, gradient = _one_step(CHOSEN[name], SPLIT)
    assert not gradient.any()


def test_random_slopes_are_the_gradient() -> None:
    weight, x, drawn, gradient = _one_step(DROPPED["rrelu"], SPLIT)
    torch.testing.assert_close(gradient, drawn / weight * x)


@pytest.mark.parametrize("name", ["normal", "gamma", "beta"])
def test_reparametrised_samples_have_torch_s_gradients(name: str) -> None:
    """The gradient as torch's own backward gives it for these samples."""

    def expected(h: Tensor, drawn: Tensor, x: Tensor) -> Tensor:
        a = h.exp()
        if name == "normal":
            return x * (1 + drawn - h)
        if name == "gamma":  # the logarithm of a sample over its rate
            sample = drawn.exp() * a
            return x * (torch._standard_gamma_grad(a, sample) / sample * a - 1)
        slope = torch._dirichlet_grad(drawn, a, 2 * a) * (1 - drawn)
        other = torch._dirichlet_grad(1 - drawn, a, 2 * a) * drawn
        return x * a * (slope - other)

    weight, x, drawn, gradient = _one_step(SAMPLED[name], SPLIT)
    torch.testing.assert_close(gradient, expected(weight, drawn, x))


def test_steps_differ_and_evaluations_do_not_change_them() -> None:
    model, x = Drawing(torch.rand_like).double(), real(8, 6)
    program = meshwright.compile(model, meshwright.Plan.parse(PLANS["data"]), (x,))
    first, second = program.launch(), program.launch()
    losses = [first.step(x) for _ in range(3)]
    assert len({float(loss) for loss in losses}) == 3
    assert len({float(second.evaluate(x)) for _ in range(3)}) == 3
    assert [second.step(x) for _ in range(3)] == losses
    assert program.launch(seed=1).step(x) != losses[0]


def test_torchs_own_generator_is_left_alone() -> None:
    model, x = Drawing(*MADE.values()).double(), real(8, 6)
    run = meshwright.compile(model, meshwright.Plan.parse(PLANS["data"]), (x,)).launch()
    before = torch.get_rng_state()
    run.step(x)
    assert torch.get_rng_state().equal(before)


# -- what is refused -------------------------------------------------------------------------------


@torch.library.custom_op("tests::noise", mutates_args=(), tags=torch.Tag.nondeterministic_seeded)
def noise(x: Tensor) -> Tensor:
    return torch.randn_like(x)


noise.register_fake(lambda x: torch.empty_like(x))


class Refused(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.up, self.body, self.own = nn.Linear(6, 6), body, torch.Generator()
        self.lstm = nn.LSTM(6, 6, 2, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.up(x)).square().mean()  # type: ignore[no-any-return]


def seeded(model: Refused, h: Tensor) -> Tensor:
    torch.manual_seed(0)
    return h * torch.rand_like(h)


REFUSED: dict[str, Callable[[Refused, Tensor], Tensor]] = {
    "an operator that is not known": lambda model, h: h * noise(h.detach()),
    "a recurrent network with dropout": lambda model, h: model.lstm(h)[0],
    "a generator": lambda model, h: h * torch.rand(8, 6, generator=model.own),
    "a generator of a write": lambda model, h: h * torch.empty(8, 6).normal_(generator=model.own),
    "a seed": seeded,
}


def test_what_cannot_be_the_same_on_every_rank_is_refused_by_name(
    golden: Callable[[str, str], None],
) -> None:
    texts = []
    for name, body in REFUSED.items():
        with pytest.raises(meshwright.CaptureError) as caught:
            meshwright.compile(
                Refused(body), meshwright.Plan.parse(PLANS["data"]), (torch.randn(8, 6),)
            )
        lines = str(caught.value).splitlines()
        texts.append("\n".join([f"# {name}", *(line for line in lines if "at: " not in line)]))
    golden("random-refused", "\n\n".join(texts))


def test_numbers_of_python_are_constants_and_that_is_said() -> None:
    import random

    plan = meshwright.Plan.parse(PLANS["data"])
    model = Refused(lambda model, h: h * random.random())
    with pytest.warns(UserWarning, match="draws from Python's `random`"):
        meshwright.compile(model, plan, (torch.randn(8, 6),))

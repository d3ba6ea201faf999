"""A NaN or an infinity stops before the update, and what made it is named."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from meshwright.passes.statements.offloading import amount
from meshwright.runtime.errors import NonFiniteError
from tests.runtime.models import batch, make
from tests.runtime.test_run import compiled

Golden = Callable[[str, str], None]
DATA = "mesh dp=2\ndata x, y over dp\n"
SHARDED = (
    "mesh dp=2, tp=2\ndata x, y over dp\ncolumns blocks.*.up over tp\n"
    "rows blocks.*.down over tp\nzero 3 over dp\naccumulate 2\n"
)
AWAY = f"{DATA}offload parameters\noffload activations\n"
AXES = "mesh a=2, b=2\ndata x, y over (a, b)\nzero 2 over b\n"


@pytest.fixture(autouse=True)
def small_values_move_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amount, "SMALL_BYTES", 0)


def overflow(h: Tensor) -> Tensor:
    return torch.tanh((h * 1e5).exp() * 1e-9)


def difference_of_infinities(h: Tensor) -> Tensor:
    large = (h * 1e5).exp()
    return h + (large - large)


def discarded_root(h: Tensor) -> Tensor:
    """Its NaNs are not in the forward's result, and yet in the gradient."""
    return torch.where(h > 0, h.sqrt(), h)


def harmless_root(h: Tensor) -> Tensor:
    """Its NaNs are in nothing."""
    return h + h.detach().sqrt().nan_to_num(0.0) * 0.1


def masked_rows(h: Tensor) -> Tensor:
    """Attention in which a query sees nothing, and all others a part."""
    seen = torch.ones(h.shape[-1], h.shape[-1], dtype=torch.bool).tril(-1)
    return h.unsqueeze(-2).softmax(-1).squeeze(-2) + h.unsqueeze(-1).expand(
        *h.shape, h.shape[-1]
    ).masked_fill(~seen, -torch.inf).softmax(-1).sum(-1)


def masked(h: Tensor) -> Tensor:
    seen = torch.ones(h.shape[-1], h.shape[-1], dtype=torch.bool).tril()
    scores = h.unsqueeze(-1).expand(*h.shape, h.shape[-1])
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).sum(-1)


class Block(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(8, 16), nn.Linear(16, 8), middle

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.middle(self.up(x)))


class Model(nn.Module):
    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(torch.tanh), Block(middle)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x), y)


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 8, generator=generator), torch.arange(8) % 5


@functools.cache
def program(middle: Callable[[Tensor], Tensor], plan: str) -> mw.Program:
    torch.manual_seed(0)
    return mw.compile(Model(middle), mw.Plan.parse(plan), example())


def stopped(run: mw.Run, x: Tensor, y: Tensor) -> NonFiniteError:
    """The error of an update after this step, which has changed nothing."""
    optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
    run.step(x, y)
    before, gradients = run.state_dict(), run.gradients()
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step()
    assert not optimizer.state
    for ours, theirs in ((run.state_dict(), before), (run.gradients(), gradients)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    optimizer.zero_grad()
    return caught.value


@pytest.mark.parametrize(
    "plan", [DATA, SHARDED, AXES, AWAY], ids=["data", "sharded", "axes", "away"]
)
@pytest.mark.parametrize(
    ("middle", "problem", "cause"),
    [
        (overflow, "`mul` in `blocks.1` made a NaN", "that `exp` in `blocks.1` made"),
        (difference_of_infinities, "`sub` in `blocks.1` made a NaN", "`exp` in `blocks.1` made"),
        (discarded_root, "`sqrt` in `blocks.1` made a NaN", "`sqrt` of `stage0.forward`"),
        (masked_rows, "softmax` in `blocks.1` made a NaN", "it took in an infinity that"),
    ],
)
def test_the_operator_that_makes_the_first_nan_is_named(
    middle: Callable[[Tensor], Tensor], problem: str, cause: str, plan: str
) -> None:
    error = stopped(program(middle, plan).launch(), *example())
    assert problem in error.problem
    assert cause in "\n".join(error.where)
    assert error.rank == 0


@pytest.mark.parametrize("middle", [harmless_root, masked])
def test_nans_and_infinities_that_reach_no_gradient_stop_nothing(
    middle: Callable[[Tensor], Tensor],
) -> None:
    run = program(middle, DATA).launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    run.step(*example())
    optimizer.step()
    x, y = example()
    assert run.step(x.index_fill(0, torch.tensor([7]), torch.nan), y).isnan()
    with pytest.raises(NonFiniteError, match="the input `x` has a NaN on rank 1"):
        optimizer.step()


@pytest.mark.parametrize(("plan", "rank"), [(DATA, 1), (SHARDED, 2), (AXES, 2), (AWAY, 1)])
def test_an_input_and_a_parameter_that_have_it_already_are_named(plan: str, rank: int) -> None:
    run, (x, y) = program(torch.tanh, plan).launch(), example()
    x[5, 3] = torch.nan
    error = stopped(run, x, y)
    assert (error.problem, error.rank) == (f"the input `x` has a NaN on rank {rank}", rank)
    state = run.state_dict()
    state["blocks.1.down.weight"][7, 15] = torch.inf
    run.load_state_dict(state)
    found = stopped(run, *example()).problem
    assert "the parameter `blocks.1.down.weight` has an infinity on rank" in found


def test_the_text_names_node_line_and_what_to_do(golden: Golden) -> None:
    error = stopped(program(difference_of_infinities, SHARDED).launch(), *example())
    lines = [line for line in str(error).splitlines() if "test_finite.py" not in line]
    assert len(lines) == len(str(error).splitlines()) - 1
    golden("run-not-finite", "\n".join(lines))
    run, (x, y) = program(torch.tanh, DATA).launch(), example()
    texts = [str(stopped(run, x.index_fill(0, torch.tensor([5]), torch.nan), y))]
    state = run.state_dict()
    state["blocks.1.down.weight"][7, 15] = torch.inf
    run.load_state_dict(state)
    golden("run-not-finite-given", "\n".join([*texts, str(stopped(run, x, y))]))


def test_the_bad_one_of_multiple_steps_is_found_with_its_buffers_and_random_numbers() -> None:
    class Noisy(nn.Module):
        """Makes a NaN of one value of its counter, where dropout leaves anything."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            x = F.dropout(self.linear(x), 0.5)
            return (x * 0 / (self.count - 2)).sum() + x.square().mean()

    x = torch.ones(4, 4)
    run = mw.compile(Noisy(), mw.Plan.parse("mesh dp=2\ndata x over dp"), (x,)).launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(3):
        run.step(x)
    with pytest.raises(NonFiniteError, match="`div` in the model made a NaN on rank 0"):
        optimizer.step()
    assert run.state_dict()["count"] == 3
    assert run.states[0].random.step == 3
    optimizer.zero_grad()
    run.step(x)
    optimizer.step()


def test_gradients_that_someone_else_spoils_are_named(golden: Golden) -> None:
    run = compiled("both").launch()
    optimizer = run.optimizer(torch.optim.AdamW)
    run.step(*batch())
    dict(run.named_parameters())["blocks.1.up.weight"].grad[0, 0] = torch.inf
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step()
    golden("run-gradient-not-finite", str(caught.value))


@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
def test_clipping_makes_a_check_cheaper_and_hides_nothing(
    norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compiled("both").launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    runs: list[int] = []
    usual = run.transport.run
    monkeypatch.setattr(run.transport, "run", lambda *args: runs.append(1) or usual(*args))
    run.step(*batch())
    run.clip_grad_norm_(1.0, norm_type)
    optimizer.step()
    assert len(runs) == 2
    dict(run.named_parameters())["wte.weight"].grad[0, 0] = torch.nan
    run.step(*batch())
    assert run.clip_grad_norm_(1.0, norm_type).isnan()
    with pytest.raises(NonFiniteError, match="has none when the steps run again"):
        optimizer.step()


def test_large_gradients_whose_sum_overflows_are_finite() -> None:
    run = compiled("both", make().float()).launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=1e-38)
    run.step(*batch())
    for parameter in run.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(1e38)
    optimizer.step()
    assert all(state.num_updates == 1 for state in run.states)


def test_checks_are_left_out_where_they_are_not_asked_for() -> None:
    x, y = example()
    bad = x.index_fill(0, torch.tensor([0]), torch.nan)
    never = program(torch.tanh, DATA).launch(check_finite=False)
    optimizer = never.optimizer(torch.optim.SGD, lr=0.1)
    never.step(bad, y)
    optimizer.step()
    assert never.state_dict()["head.bias"].isnan().all()
    seldom = program(torch.tanh, DATA).launch(check_finite=2)
    optimizer = seldom.optimizer(torch.optim.SGD, lr=0.0)
    for batch_of in (x, bad):
        seldom.step(batch_of, y)
        optimizer.step()
    seldom.step(x, y)
    with pytest.raises(NonFiniteError, match="the parameter `"):
        optimizer.step()

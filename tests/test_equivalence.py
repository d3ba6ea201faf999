"""Models under plans train as they do on one device: loss, gradients, parameters, buffers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from tests.equivalence import check_equal, implicit_gathers
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, Mlp, real, rows, tokens

MLP_TENSOR = "columns up over tp\nrows down over tp\n"
VOCAB = "vocab wte, head over tp\n"
SEQUENCE = "sequence blocks.* over tp\n"

GPT_PLANS = {
    "data": "mesh dp=4\n" + GPT_DATA,
    "data-a-row-a-rank": "mesh dp=8\n" + GPT_DATA,
    "tensor": "mesh tp=4\n" + GPT_TENSOR,
    "data-tensor": "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR,
    "data-over-two-axes": "mesh a=2, b=2, tp=2\ndata tokens, targets over (a, b)\n" + GPT_TENSOR,
    "vocab": "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + VOCAB,
    "sequence": "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + SEQUENCE,
    "sequence-vocab": "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + SEQUENCE + VOCAB,
    "sequence-kept": "mesh tp=4\n" + GPT_TENSOR + "sequence blocks.* over tp keep=[all_gather]\n",
    "by-hand": """
        mesh dp=2, tp=2
        let heads = 4
        data tokens, targets over dp
        shard blocks.*.qkv.weight [(3 heads@tp hd), d]
        shard blocks.*.qkv.bias [(3 heads@tp hd)]
        shard blocks.*.proj.weight [d, (heads@tp hd)]
        shard blocks.*.up.weight [f@tp, d]
        shard blocks.*.up.bias [f@tp]
        shard blocks.*.down.weight [d, f@tp]
        """,
}


@pytest.mark.parametrize("name", GPT_PLANS)
def test_a_gpt_trains_as_on_one_device(name: str) -> None:
    torch.manual_seed(0)
    program = check_equal(Gpt(), tokens, GPT_PLANS[name])
    assert program.comm().total_bytes() > 0
    assert implicit_gathers(program) == []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2, tp=4", "dp=8, tp=2", "dp=4, tp=4", "dp=8, tp=8"])
def test_a_gpt_trains_on_up_to_64_ranks(mesh: str) -> None:
    torch.manual_seed(0)
    model = Gpt(vocab=49, d=32, heads=8)
    check_equal(
        model, lambda: tokens(49), f"mesh {mesh}\n" + GPT_DATA + GPT_TENSOR + SEQUENCE + VOCAB
    )


MLP_PLANS = {
    "data": "mesh dp=8\ndata x over dp\n",
    "tensor": "mesh tp=8\n" + MLP_TENSOR,
    "64 ranks": "mesh dp=8, tp=8\ndata x over dp\n" + MLP_TENSOR,
    "two data axes": "mesh a=2, b=2, tp=4\ndata x over (a, b)\n" + MLP_TENSOR,
    "two tensor axes": "mesh a=2, b=2\ncolumns up over (a, b)\nrows down over (a, b)\n",
    "rows alone": "mesh tp=4\nrows up over tp\n",
    "columns alone": "mesh tp=4\ncolumns down over tp\n",
    "output": "mesh dp=2, tp=2\ndata x over dp\nshard up -> [b@dp, f@tp]\n",
    "output to whole": "mesh dp=4\ndata x over dp\nshard up -> [b, f]\n",
    "input": "mesh dp=2, tp=2\ndata x over dp\nshard down <- [b@(dp, tp), f]\n",
    "input from whole": "mesh dp=2, tp=2\nshard down <- [b@(dp, tp), f]\n",
    "weights": "mesh dp=2, tp=2\nshard up.weight [f@(dp, tp), d]\nshard down.weight [d, f@tp]\n",
    "an input by hand": "mesh dp=2, tp=2\nshard x [b@dp, d@tp]\n",
    "a pending input": "mesh tp=4\nshard x [b, d] partial(tp)\n",
    "axes of one": "mesh dp=1, tp=2, pp=1\ndata x over dp\n" + MLP_TENSOR,
}


@pytest.mark.parametrize("name", MLP_PLANS)
def test_an_mlp_trains_as_on_one_device(name: str) -> None:
    torch.manual_seed(0)
    check_equal(Mlp(), rows, MLP_PLANS[name])


def test_gradients_of_several_steps_add_up() -> None:
    check_equal(Mlp(), rows, "mesh dp=2, tp=2\ndata x over dp\n" + MLP_TENSOR, accumulate=3)


def test_sizes_may_be_odd() -> None:
    model = Mlp(d=5, f=9)
    check_equal(model, lambda: rows(9, 5), "mesh dp=3, tp=3\ndata x over dp\n" + MLP_TENSOR)


class Summed(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).square().sum()


def test_a_summed_loss_is_not_averaged_over_ranks() -> None:
    check_equal(Summed(), rows, "mesh dp=4, tp=2\ndata x over dp\n" + MLP_TENSOR)


class Marked(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        h = meshwright.layout(F.gelu(self.up(x)), "[b@dp, f@tp]")
        return self.down(h).square().mean()


def test_a_marked_activation_is_laid_out_as_marked() -> None:
    program = check_equal(Marked(), rows, "mesh dp=2, tp=2\ndata x over dp\n")
    assert "[8@dp, 32@tp]" in str(program.graph("stage0.forward"))


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 32), norm, nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x))).square().mean()


@pytest.mark.parametrize("split", [False, True], ids=["whole weight", "split weight"])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_over_a_split_dim_is_one_over_all_ranks(kind: Any, split: bool) -> None:
    norm = kind(32)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    plan = "mesh dp=2, tp=4\ndata x over dp\ncolumns a over tp\nrows b over tp\n"
    if split:
        plan += "".join(f"shard norm.{n} [d@tp]\n" for n, _ in norm.named_parameters())
    program = check_equal(Normed(norm), rows, plan)
    assert "norm_stats" in str(program.graph("stage0.forward"))
    assert implicit_gathers(program) == []


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8, momentum=0.3)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.n1(self.c1(x))), 2)
        return F.cross_entropy(self.out(F.relu(self.n2(self.c2(x))).mean((2, 3))), y)


@pytest.mark.parametrize(
    "plan", ["mesh dp=4\n", "mesh dp=4, tp=2\ncolumns c1 over tp\nrows c2 over tp\n"]
)
def test_batch_norm_takes_the_statistics_of_the_whole_batch(plan: str) -> None:
    plan += "data x, y over dp\n"
    program = check_equal(Conv(), lambda: (real(8, 3, 10, 10), torch.randint(0, 4, (8,))), plan)
    assert implicit_gathers(program) == []


class Twins(nn.Module):
    """Runs one batch norm twice, as twin networks do: the second reads what the first wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.norm(self.a(x)), self.norm(self.a(y)))


@pytest.mark.parametrize("plan", ["mesh dp=2\ndata x, y over dp\n", "mesh one=1\n"])
def test_no_gradient_flows_through_the_statistics_that_a_batch_norm_keeps(plan: str) -> None:
    check_equal(Twins(), lambda: (real(8, 8), real(8, 8)), plan)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.h, self.o = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 32, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(self.i(x[:, t]) + self.h(h))
        return F.cross_entropy(self.o(h), y)


@pytest.mark.parametrize(
    "plan",
    [
        "mesh dp=8\ndata x, y over dp\n",
        "mesh dp=2, tp=2\ndata x, y over dp\ncolumns i, h over tp\nrows o over tp\n",
    ],
)
def test_a_recurrent_loop_trains_as_on_one_device(plan: str) -> None:
    check_equal(Recurrent(), lambda: (real(8, 5, 16), torch.randint(0, 4, (8,))), plan)


class Cells(nn.Module):
    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.out = cell(16, 8), nn.Linear(8, 4)  # type: ignore[call-arg, arg-type]

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[0]):
            state = self.cell(x[t], state)
        return self.out(state if isinstance(state, Tensor) else state[0]).square().mean()


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_the_batch_may_be_another_dim(cell: type[nn.RNNCellBase]) -> None:
    plan = "mesh dp=4\ndata x over dp dim=1\n"
    program = check_equal(Cells(cell), lambda: (real(3, 8, 16),), plan)
    assert implicit_gathers(program) == []


class Layers(nn.Module):
    """A recurrent network of torch, of which both the sequence and the last state are used."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.rnn = kind(16, 8, 2, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(16 if self.rnn.bidirectional else 8, 4)
        if self.rnn.proj_size:
            self.head = nn.Linear(self.rnn.proj_size, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.rnn(self.embed(x))
        last = state if isinstance(state, Tensor) else state[1]
        return self.head(out).square().mean() + last.square().mean()


RECURRENT: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm, batch first, both directions": (
        nn.LSTM,
        {"batch_first": True, "bidirectional": True},
    ),
    "lstm, projected, without bias": (nn.LSTM, {"proj_size": 4, "bias": False}),
    "gru, batch first": (nn.GRU, {"batch_first": True}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_network_works_on_its_part_of_the_batch(name: str) -> None:
    kind, options = RECURRENT[name]
    torch.manual_seed(0)
    dim = 0 if options.get("batch_first") else 1
    plan = f"mesh dp=2, tp=2\ndata x over dp dim={dim}\ncolumns embed over tp\n"
    program = check_equal(Layers(kind, **options), lambda: (real(4, 4, 8),), plan)
    assert {moved.kind for moved in program.comm() if "dp" in moved.axes} == {"all_reduce"}


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(12, 8), nn.Embedding(6, 8)
        self.start = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(6).expand(tokens.shape[0], 6)
        start = self.start.expand(tokens.shape[0], -1, -1)
        x = torch.cat([start, self.token(tokens) * self.place(places)], 1)
        return x.square().mean()


def test_no_gradient_is_gathered_for_what_is_repeated_along_the_batch() -> None:
    program = check_equal(
        Positions(), lambda: (torch.randint(0, 12, (8, 6)),), "mesh dp=4\ndata tokens over dp\n"
    )
    assert program.comm().counts() == {"all_reduce[dp]": 2}


@dataclasses.dataclass
class Result:
    loss: Tensor
    hidden: list[Any]


class Keywords(Mlp):
    def forward(self, *, x: Tensor, scale: Tensor) -> Any:  # type: ignore[override]
        h = self.down(F.gelu(self.up(x)))
        return Result((h * scale).square().mean(), [h, {"deep": h.sum(-1)}])


def test_inputs_may_be_keywords_and_outputs_nested() -> None:
    check_equal(
        Keywords(),
        lambda: {"x": real(8, 16), "scale": real(8, 1)},
        "mesh dp=2, tp=2\ndata x, scale over dp\n" + MLP_TENSOR,
        outputs=["hidden.0", "hidden.1.deep"],
    )


def test_the_loss_may_be_a_function_of_the_output() -> None:
    class Plain(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    plan = "mesh dp=2, tp=2\ndata x over dp\n" + MLP_TENSOR
    check_equal(Plain(), rows, plan, loss=lambda output: output.abs().sum(-1).mean())


def test_evaluate_and_forward_use_the_trained_weights_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = Gpt(p=0.5).double()
    batch = tokens()
    plan = "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + VOCAB
    run = meshwright.compile(model, meshwright.Plan.parse(plan), example=batch).launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    run.step(*batch)
    optimizer.step()
    run.copy_to(model)
    with torch.no_grad():
        expected = model.eval()(*batch)
    torch.testing.assert_close(run.evaluate(*batch), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(run.forward(*batch), expected, rtol=0, atol=1e-12)

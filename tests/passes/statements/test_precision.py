"""The pass `precision`: the types in which values are computed, stored, sent and returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright import PlanError
from meshwright.compiler.graph.ir import Graph, MeshOp, Phase, op_stem
from meshwright.compiler.graph.transfers import combines, moves
from meshwright.compiler.public import Program
from meshwright.passes import widen
from meshwright.passes.statements import precision
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens
from tests.passes import examples
from tests.passes.experts import dense
from tests.passes.stages import check_documented, shown, stages

BF16, F32 = torch.bfloat16, torch.float32
ROUNDING = 2.0**-8
"""Half of the distance between numbers of bf16 near 1."""
ONE = "mesh dp=1\n" + GPT_DATA + "precision bf16\n"
DATA = "mesh dp=4\n" + GPT_DATA + "precision bf16\n"
TENSOR = "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + "precision bf16\n"
SEQUENCE = TENSOR + "vocab wte, head over tp\nsequence blocks.* over tp\n"


def compiled(model: nn.Module, example: Any, plan: str) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), example=example)


def step(plan: str, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one step."""
    with compiled(model, batch(), plan).launch(seed=0) as run:
        return run.step(*batch()), run.gradients()


def batch() -> tuple[Tensor, Tensor]:
    """The same tokens and targets each time."""
    torch.manual_seed(1)
    return tokens()


def gpt(dtype: torch.dtype = F32) -> Gpt:
    torch.manual_seed(0)
    return Gpt(layers=1).to(dtype)


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of a gradient, of its own length."""
    assert found.keys() == expected.keys()
    pairs = ((found[name].float(), expected[name].float()) for name in expected)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def dtypes(graph: Graph, op: str) -> set[torch.dtype]:
    """The types of the results of an operator."""
    return {n.tensor.dtype for n in graph.nodes if str(n.op).split(".")[1:2] == [op]}


def test_the_docstring_shows_a_linear_and_a_softmax_before_and_after() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16, 64)

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.up(x), -1).square().sum()

    found = stages(Choice(), (torch.randn(8, 16),), "mesh dp=1\nprecision bf16\n")
    names = "up_weight", "linear", "softmax"
    casts = "to_copy", "to_copy_1", "to_copy_2", "to_copy_3"
    check_documented(
        precision, shown(found["route"], *names), shown(found["precision"], *names, *casts)
    )


def test_the_docstring_shows_the_gradient_of_a_weight_before_and_after() -> None:
    plan = "mesh dp=2\ndata x over dp\nprecision bf16\n"
    found = stages(examples.Mlp(), (torch.randn(8, 16),), plan)
    before, after = found["sum_first"], found["widen"]
    (grad,) = [o.node for o in before.outputs if o.name == "up.weight"]
    reduced = grad.args[0]
    (wide,) = [o.node for o in after.outputs if o.name == "up.weight"]
    assert [n.tensor.dtype for n in (grad, reduced, wide)] == [F32, BF16, F32]
    assert wide.args[0].op == grad.op
    assert wide.op == reduced.op
    assert "reduce" in str(reduced.op)
    assert widen.__doc__ is not None
    assert "all_reduce: f32[64, 16]" in widen.__doc__


@pytest.mark.parametrize("tail", ["", "accumulate 2\n"])
@pytest.mark.parametrize(
    "plan",
    [
        DATA,
        DATA + "zero 1 over dp\n",
        DATA + "zero 2 over dp\n",
        DATA + "zero 3 over dp\n",
        TENSOR + "zero 3 over dp\n",
        SEQUENCE,
        SEQUENCE + "zero 2 over dp\n",
        DATA.replace("bf16", "bf16 reduce=bf16"),
        SEQUENCE.replace("bf16", "bf16 reduce=bf16") + "zero 1 over dp\n",
        SEQUENCE.replace("bf16", "bf16 reduce=bf16") + "zero 3 over dp\n",
    ],
)
def test_every_plan_differs_from_one_rank_by_the_rounding_of_bf16(plan: str, tail: str) -> None:
    loss, gradients = step(plan + tail, gpt())
    expected, own = step(ONE, gpt())
    assert loss.dtype == F32
    assert {each.dtype for each in gradients.values()} == {F32}
    assert abs(loss - expected) < ROUNDING * expected
    assert apart(gradients, own) < 8 * ROUNDING


def test_one_rank_is_as_near_to_the_model_as_autocast_is() -> None:
    loss, gradients = step(ONE, gpt())
    exact, wanted = step(ONE.replace("precision bf16\n", ""), gpt())
    model = gpt()
    with torch.autocast("cpu", BF16):
        other = model(*batch())
    other.backward()
    own = {name: each.grad for name, each in model.named_parameters(remove_duplicate=False)}
    assert abs(loss - exact) < ROUNDING * exact
    assert abs(loss - other) < ROUNDING * exact
    assert apart(gradients, wanted) < 2 * apart(own, wanted) + ROUNDING


@pytest.mark.parametrize(
    ("dtype", "word"), [(F32, "fp32"), (torch.float64, "fp64")], ids=["fp32", "fp64"]
)
def test_the_type_of_the_model_changes_nothing(dtype: torch.dtype, word: str) -> None:
    plan = SEQUENCE + "zero 3 over dp\naccumulate 2\n"
    loss, gradients = step(plan.replace("bf16", word), gpt(dtype))
    expected, own = step(plan.replace("precision bf16\n", ""), gpt(dtype))
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, own[name]), name


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("tail", ["", "accumulate 2\n"])
def test_weights_are_cast_before_they_are_gathered(level: int, tail: str) -> None:
    """Half of the bytes of each weight move; norms take theirs in float32."""
    plan = f"{DATA}zero {level} over dp\n{tail}"
    sent = {
        word: {
            kind: sum(m.bytes * m.times for m in each if m.kind == kind)
            for kind in ("all_gather", "reduce_scatter")
        }
        for word in ("bf16", "fp32")
        for each in [compiled(gpt(), batch(), plan.replace("bf16", word)).comm()]
    }
    norms = sum(p.numel() for name, p in gpt().named_parameters() if "ln" in name)
    share = norms / sum(p.numel() for p in gpt().parameters())
    assert sent["bf16"]["reduce_scatter"] == sent["fp32"]["reduce_scatter"]
    ratio = sent["bf16"]["all_gather"] / sent["fp32"]["all_gather"]
    assert ratio == pytest.approx((1 + share) / 2, rel=0.01)


def test_gradients_are_reduced_in_the_type_that_the_plan_names() -> None:
    plan = DATA.replace("bf16", "bf16 reduce=bf16") + "zero 2 over dp\n"
    narrow = compiled(gpt(), batch(), plan).comm()
    wide = compiled(gpt(), batch(), plan.replace(" reduce=bf16", "")).comm()
    ours, theirs = (
        sum(m.bytes for m in each if m.kind == "reduce_scatter") for each in (narrow, wide)
    )
    assert ours * 2 == theirs


def test_microbatches_are_added_up_in_float32_and_weights_cast_once() -> None:
    plan = DATA.replace("bf16", "bf16 reduce=bf16") + "zero 1 over dp\naccumulate 2\n"
    program = compiled(gpt(), batch(), plan)
    (stage,) = program.stages
    before = stage.graphs[Phase.BEFORE].nodes
    casts = [n for n in before if str(n.op) == "aten._to_copy.default" and n.args[0].held]
    assert {n.tensor.dtype for n in casts} == {BF16}
    assert len({n.args[0] for n in casts}) == len(casts) > 4
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        nodes = stage.graphs[phase].nodes
        weights = [n for n in nodes if "_to_copy" in str(n.op) and n.args[0].held]
        assert weights == []
    summed = [n for g in program.graphs().values() for n in g.nodes if combines(n, g.mesh)]
    assert {n.tensor.dtype for n in summed if n.tensor.shape} <= {F32, torch.int64}
    after = [n for n in stage.graphs[Phase.AFTER].nodes if moves(n) and "scatter" in str(n.op)]
    assert {t.dtype for n in after for t, _ in n.results if t is not None} == {BF16}


class Mixed(nn.Module):
    """Operators of every kind, tables of integers, a float64 value and a buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.linear, self.group = nn.Linear(4, 4), nn.GroupNorm(2, 4)
        self.register_buffer("steps", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.group(torch.relu(self.norm(self.conv(x))))
        rows = self.linear(y.mean((2, 3)))
        exact = (rows.double() * 2).sum()
        angles = torch.cos(self.steps[:4].outer(self.steps[:4]))
        return F.mse_loss(rows @ angles, x.flatten(1)[:, :4].exp()) + exact.float() * 0


def test_sums_and_statistics_are_float32_and_what_the_model_casts_stays() -> None:
    torch.manual_seed(0)
    program = compiled(Mixed(), (torch.randn(4, 3, 6, 6),), "mesh dp=1\nprecision bf16\n")
    forward = program.stages[0].forward
    assert dtypes(forward, "conv2d") == dtypes(forward, "matmul") == {BF16}
    assert dtypes(forward, "exp") == dtypes(forward, "cos") == {F32}
    assert dtypes(forward, "outer") | dtypes(forward, "mul") <= {F32, torch.float64}
    assert torch.float64 in {n.tensor.dtype for n in forward.nodes if not isinstance(n.type, tuple)}
    (updates,) = [o.node for o in forward.outputs if o.name == "norm.running_mean"]
    assert updates.tensor.dtype == F32
    with program.launch() as run:
        assert run.step(torch.randn(4, 3, 6, 6)).dtype == F32
        assert {each.dtype for each in run.state_dict().values()} == {F32, torch.int64}


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).sum()


def test_the_gradient_of_a_row_that_is_read_often_is_added_up_in_float32() -> None:
    """A sum of ones in bf16 ends at 256."""
    example = (torch.zeros(1000, dtype=torch.long),)
    with compiled(Table(), example, "mesh dp=1\nprecision bf16\n").launch() as run:
        run.step(*example)
        assert run.gradients()["table.weight"][0, 0] == 1000


def test_parameters_are_stored_in_the_type_that_the_plan_names() -> None:
    plan = "mesh dp=2\ndata x over dp\nprecision bf16 master=bf16\n"
    found = stages(examples.Mlp(), (torch.randn(8, 16),), plan)["bucket"]
    weights = [n for n in found.inputs if n.args[0] == "parameter"]
    assert {n.tensor.dtype for n in weights} == {BF16}
    assert {o.node.tensor.dtype for o in found.outputs if o.kind == "gradient"} == {F32}


def test_a_model_of_bf16_trains_with_masters_of_float32() -> None:
    plan = TENSOR.replace("bf16", "bf16 master=fp32") + "zero 1 over dp\n"
    program = compiled(gpt(BF16), batch(), plan)
    assert {each.type.dtype for each in program.parameters.values()} == {F32}
    with program.launch() as run:
        optimizer = run.optimizer(torch.optim.SGD, lr=2.0**-20)
        before = run.state_dict()["wte.weight"]
        run.step(*batch())
        optimizer.step()
        after = run.state_dict()["wte.weight"]
    assert after.dtype == F32
    assert not torch.equal(after, before)
    assert torch.equal(after.to(BF16), before.to(BF16))


class Marked(nn.Module):
    """A router, and products that the model computes in a type of its own choice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.router, self.exact = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        chosen = torch.topk(torch.softmax(self.router(y), -1), 2).values
        exact = F.linear(y.float(), self.exact.weight.float())
        with torch.autocast("cpu", enabled=False):
            off = torch.bmm(y[None], y.t()[None])
        return (chosen.sum() + exact.sum() + off.sum()) * 1e-2


class Counted(Marked):
    """The same, with a write in place: casts that change nothing in float32 are traced away."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Marked, Counted])
def test_the_model_and_the_plan_say_what_stays_in_float32(kind: type[Marked]) -> None:
    example = (torch.randn(4, 8),)
    forward = compiled(kind(), example, "mesh dp=1\nprecision bf16\n").stages[0].forward
    products = [n for n in forward.nodes if op_stem(n.op) in ("linear", "addmm", "mm")]
    assert [n.tensor.dtype for n in products] == [BF16, F32, F32]
    assert dtypes(forward, "bmm") == {F32}
    for keep in ("matmul", "up", '[norm, "u*"]'):
        plan = f"mesh dp=1\nprecision bf16 keep={keep}\n"
        kept = compiled(Marked(), example, plan).stages[0].forward
        first = next(n for n in kept.nodes if "linear" in str(n.op))
        assert first.tensor.dtype == F32, keep


class Masked(nn.Module):
    """Scores masked with the least number of float32, which is none of 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.up(x)
        mask = torch.ones(8, 8, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1).square().sum()


@pytest.mark.parametrize("word", ["bf16", "fp16"])
def test_numbers_that_16_bits_do_not_have_are_used_in_float32(word: str) -> None:
    x, model = torch.randn(2, 8, 8), Masked()
    with compiled(model, (x,), f"mesh dp=2\ndata x over dp\nprecision {word}\n").launch() as run:
        torch.testing.assert_close(run.step(x), model(x).detach(), rtol=0.01, atol=0)
        assert all(gradient.isfinite().all() for gradient in run.gradients().values())


def test_tokens_go_to_experts_and_come_back_in_the_compute_type() -> None:
    class Plain(nn.Sequential):
        def __init__(self, width: int) -> None:
            up, down = nn.Linear(width, 16, bias=False), nn.Linear(16, width, bias=False)
            super().__init__(up, nn.GELU(), down)

    plan = "mesh dp=2\ndata x, labels over dp\nexperts blocks.*.mlp over dp count=4\n"
    x = torch.randn(8, 6, 8), torch.zeros(8, 6, dtype=torch.int64)
    program = compiled(dense.Model(1, make=Plain), x, plan + "precision bf16\n")
    graphs = program.stages[0].graphs.values()
    sent = [n for graph in graphs for n in graph.nodes if n.op == MeshOp("all_to_all")]
    assert len(sent) == 4
    assert {node.tensor.dtype for node in sent} == {torch.bfloat16}
    given = [n for g in graphs for n in g.nodes if n.op in (MeshOp("dispatch"), MeshOp("combine"))]
    assert {node.tensor.dtype for node in given} == {torch.bfloat16}
    weights = [n for g in graphs for n in g.nodes if n.op == MeshOp("combine_weight")]
    assert {node.tensor.dtype for node in weights} == {torch.float32}


def test_a_model_of_float32_computes_in_float64() -> None:
    found, gradients = step(DATA.replace("bf16", "fp64"), gpt())
    expected, own = step(DATA.replace("precision bf16\n", ""), gpt(torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert apart(gradients, own) < 1e-6


def test_a_norm_that_is_kept_returns_float32() -> None:
    kept = compiled(gpt(), batch(), ONE.replace("bf16", "bf16 keep=norm"))
    found = [n.type for n in kept.stages[0].forward.nodes if "norm" in str(n.op)]
    assert found
    assert {each[0].dtype for each in found} == {F32}


def test_evaluation_and_inference_compute_in_the_same_type() -> None:
    program = compiled(gpt(), batch(), TENSOR + "zero 3 over dp\n")
    with program.launch() as run:
        loss, held_out = run.step(*batch()), run.evaluate(*batch())
        assert abs(loss - held_out) < ROUNDING * loss
        assert held_out.dtype == F32


@pytest.mark.parametrize(
    ("plan", "dtype", "message"),
    [
        ("precision bf16 dropout=native", F32, "`dropout=native` is part of the language, but"),
        ("precision bf16", torch.float64, "has nothing to compute in it"),
        ("precision bf16 keep=[norms]", F32, "`keep=norms` matches nothing"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(plan: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        compiled(gpt(dtype), batch(), f"mesh dp=1\n{plan}\n")
    assert message in str(caught.value)
    assert "help:" in str(caught.value)

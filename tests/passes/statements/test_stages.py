"""`stages`: the graph is cut into stages that compute what the whole model does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.public import Program
from meshwright.dsl.errors import PlanError
from meshwright.dsl.statements import SCHEDULES
from meshwright.passes.statements import stages
from tests.equivalence import check_equal
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, Mlp, real, tokens
from tests.passes import examples
from tests.passes.stages import check_documented, shown
from tests.passes.stages import stages as after_each_pass
from tests.test_equivalence_huggingface import TOLERANCE, bert, gpt2, llama, masked_text, t5, text

TWO = "stages at blocks.1 over pp microbatches=2\n"
BATCHED = "stages at b, c, d over pp microbatches=2\ndata x, y, mask over dp\n"
SPLIT = f"{GPT_TENSOR}sequence blocks.* over tp\nvocab wte, head over tp\n"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def compiled(model: nn.Module, example: Any, plan: str, **options: Any) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), example=example, **options)


def test_the_docstring_shows_a_cut_before_and_after() -> None:
    plan, names = "mesh pp=2\n", ("linear", "relu", "linear_1")
    example = (torch.randn(8, 16),)
    whole, cut = (
        after_each_pass(examples.Mlp(), example, each)["partition"]
        for each in (plan, f"{plan}stages at down over pp\n")
    )
    check_documented(stages, shown(whole, *names), shown(cut, *names, "transfer"))


def test_four_stages_train_a_tied_model_as_one_process_does() -> None:
    plan = "mesh pp=4\nstages at blocks.1, blocks.2, blocks.3 over pp microbatches=4\n"
    program = check_equal(Gpt(layers=4), tokens(), f"{plan}data tokens, targets\n")
    assert [stage.number for stage in program.stages] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "plan",
    [
        "mesh pp=2\nstages at blocks.1 over pp\n",
        "mesh pp=2\nstages at blocks.0.up over pp microbatches=4\ndata tokens, targets\n",
        f"mesh dp=2, pp=2, tp=2\n{TWO}{GPT_DATA}{SPLIT}",
        *(f"mesh dp=2, pp=2\n{TWO}{GPT_DATA}zero {level} over dp\n" for level in (1, 2, 3)),
    ],
    ids=["whole batch", "inside a block", "tensor parallel", "zero 1", "zero 2", "zero 3"],
)
def test_stages_go_with_other_statements(plan: str) -> None:
    check_equal(Gpt(), tokens(), plan)


SCHEDULED = ("gpipe", "zb", "zbh2", "interleaved", "zbv", "dualpipe", "dualpipev")


@pytest.mark.parametrize("schedule", SCHEDULED)
def test_every_schedule_trains_as_one_process_does(schedule: str) -> None:
    virtual = SCHEDULES[schedule][0]
    modules = "blocks.1" if virtual == 1 else "blocks.1, blocks.2, blocks.3"
    options = f"schedule={schedule} microbatches=4 virtual={virtual}"
    plan = f"mesh dp=2, pp=2\nstages at {modules} over pp {options}\n{GPT_DATA}zero 2 over dp\n"
    program = check_equal(Gpt(layers=4), tokens(), plan, steps=2)
    both = schedule == "dualpipe"  # each of two ranks has a copy of either stage
    assert program.parameters["wte.weight"].held_at == ({} if both else {"pp": (0,)})
    assert program.memory().peak > 0


def test_few_labels_in_some_microbatches_count_for_as_much_as_they_are() -> None:
    labels = torch.full((8, 8), -100)
    labels[0, :3], labels[7, 1] = 5, 2
    plan = f"mesh pp=2\n{TWO}data tokens, targets\n".replace("=2\ndata", "=4\ndata")
    check_equal(Gpt(), (tokens()[0], labels), plan)
    check_equal(Gpt(), (tokens()[0], labels), plan.replace("=4\n", "=4 schedule=dualpipe\n"))


def test_microbatches_may_come_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that a rank takes, whichever it is, writes over what sums held before."""
    monkeypatch.chdir(tmp_path)
    actions = [f"{{}}F{i}" for i in (2, 0, 1)] + [f"{{}}B{i}" for i in (1, 2, 0)]
    lines = [",".join(actions).replace("{}", str(stage)) for stage in range(2)]
    Path("own.csv").write_text("\n".join(lines), encoding="utf-8")
    plan = 'mesh pp=2\nstages at down over pp microbatches=3 schedule="own.csv"\ndata x\n'
    check_equal(Mlp(), (real(6, 16),), plan, steps=2)


class Skips(nn.Module):
    """A value used by three later stages, integers and booleans that cross, a weight of two stages,
    a mask, a buffer that an output alone takes, and outputs of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> dict[str, Tensor]:
        h = self.a(x) + self.scale
        i, positive = h.argmax(-1), h > 0
        second = torch.tanh(self.b(h)) * mask.unsqueeze(-1)
        z = self.d(torch.tanh(self.c(second)) * mask.unsqueeze(-1)) + h * self.scale
        z = z + torch.where(positive, h, second) + F.one_hot(i, 8) * y.unsqueeze(-1)
        loss = z.square().mean() + self.scale.square().mean()
        return {"loss": loss, "second": second, "mask": mask * self.factor, "z": z, "i": i}


@pytest.mark.parametrize(
    "plan",
    [
        "mesh pp=4\nstages at b, c, d over pp\n",
        f"mesh dp=2, pp=4\n{BATCHED}zero 2 over dp\n",
    ],
    ids=["whole batch", "microbatches"],
)
def test_values_are_relayed_from_stage_to_stage(plan: str) -> None:
    example = real(8, 8), real(8), torch.rand(8) > 0.3
    check_equal(Skips(), example, plan, outputs=("second", "mask", "z", "i"))


class Odd(nn.Module):
    """Three layers, a weight that the first and the last scale with, and a loss of what `kind`
    makes in the first stage, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("kept", torch.zeros(8))
        self.register_buffer("base", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.scale
        early = getattr(self, self.kind)(h)
        y = self.c(self.b(h)) * self.scale
        return y.square().mean() + early.sum() * 0.1 + (early * 2).sum()

    def total(self, h: Tensor) -> Tensor:
        return h.sum()

    def empty(self, h: Tensor) -> Tensor:
        return h[:, :0]

    def buffer(self, h: Tensor) -> Tensor:
        return self.kept.copy_(self.a.bias.detach() * 2)

    def decay(self, h: Tensor) -> Tensor:
        self.kept.copy_(self.base * 2)
        return self.a.weight.square()


@pytest.mark.parametrize("kind", ["total", "empty", "buffer", "decay"])
@pytest.mark.parametrize(
    "plan",
    [
        "mesh pp=3\nstages at b, c over pp microbatches=2 schedule=zb\ndata x\n",
        "mesh dp=2, pp=2\nstages at b over pp microbatches=2\ndata x over dp\n",
    ],
    ids=["alone", "data"],
)
def test_gradients_that_no_microbatch_changes_and_buffers_of_weights_are_where_they_belong(
    plan: str, kind: str
) -> None:
    check_equal(Odd(kind), (real(8, 8),), plan)


class Shared(nn.Module):
    """Weights of three stages, some trained, some not, and parts of what is computed from one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.c.weight = self.a.weight
        self.scale = nn.Parameter(torch.randn(2, 8))
        self.fixed = nn.Parameter(torch.randn(8, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        first, last = torch.tanh(self.scale).unbind()
        h = torch.relu(self.b(self.a(x) * first)) @ self.fixed
        return (self.c(h) * last @ self.fixed.t()).square().mean()


def test_a_weight_of_multiple_stages_is_sent_once_a_step_and_so_is_its_gradient() -> None:
    plan = "mesh dp=2, pp=3, tp=2\nstages at b, c over pp microbatches=2\ndata x over dp\n"
    split = "zero 2 over dp\nshard a.weight [o@tp, i]\n"
    program = check_equal(Shared(), (real(8, 8),), plan + split)
    before = {stage.number: stage.graphs[Phase.BEFORE] for stage in program.stages}
    assert [len(stage.received(Phase.BEFORE)) for stage in program.stages] == [0, 0, 3]
    assert "a.weight" not in [node.args[1] for node in before[2].inputs]
    after = [stage.sent(Phase.AFTER) for stage in program.stages]
    # Two gradients and, for the two others, the loss.
    assert [len(each) for each in after] == [0, 0, 4]


class Normed(nn.Module):
    """In evaluation it has fewer modules, and takes a weight of the first stage in the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.norm(self.b(h * self.scale)) if self.training else h
        return self.c(h * self.scale).square().mean()


def test_evaluation_keeps_each_weight_where_training_has_it() -> None:
    model, x = Normed(), real(8, 8)
    plan = "mesh pp=2\nstages at b over pp\n"
    program = check_equal(model, (x,), plan)
    run = program.launch()
    torch.testing.assert_close(run.evaluate(x), model.double().eval()(x).detach())


HUGGING = {
    "llama": (llama, text, "model.layers.0, model.layers.1, lm_head"),
    "gpt2": (gpt2, text, "transformer.h.0, transformer.h.1, lm_head"),
    "bert": (bert, masked_text, "bert.encoder.layer.0, bert.encoder.layer.1, cls"),
    "t5": (t5, text, "encoder.block.1, decoder.block.0, decoder.block.1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGGING)
def test_a_hugging_face_model_is_cut_as_it_is(name: str) -> None:
    make, batch, modules = HUGGING[name]
    example = batch()
    plan = f"mesh dp=2, pp=4\nstages at {modules} over pp microbatches=2\n"
    plan += f"data {', '.join(example)} over dp\n"
    check_equal(make(), example, plan, tolerance=TOLERANCE, steps=2, outputs=("logits",))


MISTAKES = {
    "stages-empty-first": "mesh pp=2\nstages at wte over pp\n",
    "stages-never-run": "mesh pp=2\nstages at blocks over pp\n",
    "stages-out-of-order": "mesh pp=3\nstages at blocks.1, blocks.0.up over pp\n",
    "stages-empty": "mesh pp=3\nstages at blocks.1, blocks.1.ln1 over pp\n",
    "stages-too-many": "mesh pp=3\nstages at blocks.{0,1}.up, head over pp\n",
    "stages-unknown": "mesh pp=2\nstages at blocks.7 over pp\n",
    "stages-without-data": f"mesh pp=2\n{TWO}",
    "stages-odd-batch": f"mesh pp=2\n{TWO.replace('2', '3')}data tokens, targets\n",
    "stages-small-batch": f"mesh pp=2\n{TWO.replace('es=2', 'es=16')}data tokens, targets\n",
    "stages-balance": "mesh pp=2\nstages at blocks.1 over pp balance=flops\n",
    "stages-twice-over-two-axes": "mesh pa=2, pb=2\ndata tokens, targets\nstages at blocks.0.down, "
    "blocks.1, blocks.1.down over (pa, pb) schedule=dualpipe microbatches=8\n",
    "stages-axis-split": "mesh pp=2\nstages at blocks.1 over pp\ncolumns blocks.*.up over pp\n",
    "stages-axis-of-context": "mesh pp=2\nstages at blocks.1 over pp\ncontext blocks.* over pp\n",
    "stages-axis-of-depth": "mesh row=1, col=2, pp=2\nstages at blocks.1 over pp\n"
    "summa blocks.*.up over (row, col) depth=pp\n",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(PlanError) as caught:
        compiled(Gpt(), tokens(), MISTAKES[name])
    golden(name, str(caught.value))


class Turned(Mlp):
    """A table that a module computes from an input alone, as a model's rotary embedding does."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        turned = self.rotary(x[0])
        return super().forward(x * turned)


def test_a_module_that_no_weight_feeds_begins_no_stage(golden: Callable[[str, str], None]) -> None:
    with pytest.raises(PlanError) as caught:
        compiled(Turned(), (real(8, 16),), "mesh pp=2\nstages at rotary over pp\n")
    golden("stages-without-weights", str(caught.value))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.b(torch.relu(self.a(x)))))).sum()


class TwiceInARow(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.b(torch.relu(self.a(x)))).sum()


@pytest.mark.parametrize("model", [Twice, TwiceInARow])
def test_a_module_that_runs_in_several_places_begins_no_stage(
    model: type[nn.Module], golden: Callable[[str, str], None]
) -> None:
    with pytest.raises(PlanError) as caught:
        compiled(model(), (torch.randn(4, 8),), "mesh pp=2\nstages at b over pp\n")
    golden("stages-several-places", str(caught.value))


class Around(nn.Module):
    """A module that runs on both sides of a cut, another under two names, and a buffer of stages
    that are not next to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.again = self.c
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(self.a(x) * self.scale))
        return (self.d(self.a(torch.tanh(self.again(h)))) * self.scale).square().mean()


@pytest.mark.parametrize("over", ["dp=2, pp=4", "pa=2, dp=2, pb=2"], ids=["one axis", "two axes"])
def test_stages_share_a_module_that_runs_in_both(over: str) -> None:
    axes = "pp" if "pp" in over else "(pa, pb)"
    plan = f"mesh {over}\nstages at b, again, d over {axes} microbatches=2\ndata x over dp\n"
    check_equal(Around(), (real(8, 8),), f"{plan}zero 2 over dp\n")


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x) + self.mean)
        self.mean.add_(h.detach().mean(0))
        return h.sum()


def test_a_buffer_that_one_stage_writes_and_another_reads_is_refused(
    golden: Callable[[str, str], None],
) -> None:
    with pytest.raises(PlanError) as caught:
        compiled(Counts(), (torch.randn(4, 8),), "mesh pp=2\nstages at b over pp\n")
    golden("stages-buffer", str(caught.value))


class Early(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x if self.training else self.c(x)))).sum()


def test_a_variant_that_uses_a_weight_earlier_is_refused(
    golden: Callable[[str, str], None],
) -> None:
    x = torch.randn(4, 8)
    run = compiled(Early(), (x,), "mesh pp=2\nstages at b over pp\n").launch()
    with pytest.raises(PlanError) as caught:
        run.evaluate(x)
    golden("stages-other-mode", str(caught.value))


class Metric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.a(x)
        spread = h.detach().mean().exp()
        return {"loss": self.b(h).square().mean(), "spread": spread}


def test_what_depends_on_all_microbatches_cannot_go_to_a_later_stage(
    golden: Callable[[str, str], None],
) -> None:
    plan = "mesh pp=2\nstages at b over pp microbatches=2\ndata x\n"
    with pytest.raises(LayoutError) as caught:
        compiled(Metric(), (torch.randn(4, 8),), plan, outputs=("spread",))
    golden("stages-whole-batch", re.sub(r"\.py:\d+", ".py:<line>", str(caught.value)))

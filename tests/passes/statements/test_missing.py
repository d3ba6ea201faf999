"""Statements about modules that have no linear of their own: what is said, and following it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import meshwright
from meshwright import PlanError
from tests.equivalence import check_equal
from tests.models import real, tokens


class Adapter(nn.Module):
    """A low-rank addition to a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 16)), nn.Parameter(torch.randn(32, 3))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def adapted(linear: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(linear, "weight", Adapter())


class Parametrized(nn.Module):
    def __init__(self, wrap: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([wrap(nn.Linear(16, 32))])
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.blocks[0](x))).square().mean()


class Mixer(nn.Module):
    """A projection whose weight and bias are used, and which never runs, as in Mamba."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.x_proj, self.dt_proj = nn.Linear(size, 4), nn.Linear(4, 2 * size)
        self.out_proj = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        time = self.dt_proj.weight @ self.x_proj(x).transpose(1, 2)
        time = F.softplus(time + self.dt_proj.bias[None, :, None])
        return x + self.out_proj(time.transpose(1, 2))


class Mixers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mixer(), Mixer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Shared(nn.Module):
    """One embedding under three names, the first of which never runs, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(48, 8)
        self.inner = nn.ModuleList([nn.Embedding(48, 8), nn.Embedding(48, 8)])
        self.head = nn.Linear(8, 48, bias=False)
        for each in (*self.inner, self.head):
            each.weight = self.shared.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.inner[0](tokens) + self.inner[1](targets.clamp(min=0))
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def images() -> tuple[Tensor]:
    return (real(8, 16),)


def sequences() -> tuple[Tensor]:
    return (real(2, 6, 16),)


Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], str, str]
PARAMETRIZED = "mesh tp=2\nrows down over tp\n"
CASES: dict[str, Case] = {
    "weight-norm": (
        lambda: Parametrized(parametrizations.weight_norm),
        images,
        PARAMETRIZED,
        "columns blocks.* over tp",
    ),
    "adapter": (
        lambda: Parametrized(adapted),
        images,
        PARAMETRIZED,
        "columns blocks.0 over tp as (4 f)",
    ),
    "weight-used-alone": (
        Mixers,
        sequences,
        "mesh tp=2\nrows layers.*.out_proj over tp\n",
        "columns layers.*.dt_proj over tp",
    ),
    "rows-of-a-weight-used-alone": (
        Mixers,
        sequences,
        "mesh tp=2\n",
        "rows layers.*.dt_proj over tp",
    ),
    "tied-and-never-run": (Shared, tokens, "mesh tp=2\n", "vocab shared over tp"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_help_names_what_to_write_and_works(
    name: str, golden: Callable[[str, str], None]
) -> None:
    make, batch, plan, wrong = CASES[name]
    with pytest.raises(PlanError) as caught:
        check_equal(make(), batch, plan + wrong)
    golden(f"missing-{name}", str(caught.value))
    check_equal(make(), batch, plan + followed(wrong, caught.value.help))


def followed(statement: str, help: str) -> str:
    """The plan's lines after doing what the help says."""
    verb, _, rest = statement.split(" ", 2)
    texts = re.findall(r"`([^`]*)`", help)
    if help.startswith("name "):
        return f"{verb} {', '.join(texts)} {rest}"
    return "\n".join(texts)


class Ensemble(nn.Module):
    """Heads that only evaluation uses, and one that nothing does."""

    def __init__(self, classes: int = 12) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(16, 8), nn.Linear(8, classes)
        self.second, self.spare = nn.Linear(8, classes), nn.Linear(8, classes)
        self.norm = nn.LayerNorm(classes)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.up(x).tanh()
        logits = self.head(h)
        if not self.training:
            logits = self.norm(logits + self.second(h))
        return F.cross_entropy(logits, y)


DATA = "mesh dp=2, tp=2\ndata x, y over dp\ncolumns up over tp\n"


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        (12, "columns second over tp"),
        (12, "rows second over tp"),
        (12, "shard second -> [b@dp, c@tp]"),
        (12, "shard norm <- [b@dp, c@tp]"),
        (12, "shard second.weight [c@tp, d]"),
        (11, "vocab second over tp"),
    ],
)
def test_a_line_about_a_module_that_only_evaluation_uses_is_applied_there(
    classes: int, line: str
) -> None:
    torch.manual_seed(0)
    model = Ensemble(classes).double()
    x, y = real(8, 16), torch.randint(0, classes, (8,))
    run = meshwright.compile(model, meshwright.Plan.parse(DATA + line), example=(x, y)).launch()
    torch.testing.assert_close(run.step(x, y), model(x, y).detach())
    torch.testing.assert_close(run.evaluate(x, y), model.eval()(x, y).detach())
    evaluated = next(reversed(run._programs.by_signature.values())).program
    assert "tp" in str(evaluated.graph("stage0.forward")).split("second", 1)[1]
    run.check()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("columns spare over tp", "`columns` needs a linear, and `spare` is never run"),
        ("columns norm over tp", "`columns` needs a linear, and `norm` is never run"),
        ("shard spare -> [b@dp, c@tp]", "`spare` gives no tensor"),
        ("sequence second over tp", "no activation `[batch, sequence, ...]` enters"),
    ],
)
def test_a_module_that_is_never_run_is_said_to_be(line: str, expected: str) -> None:
    example = (real(8, 16).float(), torch.randint(0, 12, (8,)))
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Ensemble(), meshwright.Plan.parse(DATA + line), example=example)
    assert expected in caught.value.message

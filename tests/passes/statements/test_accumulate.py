"""The pass `accumulate`: a step in microbatches, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright import PlanError
from meshwright.passes.statements import accumulate
from tests.equivalence import check_equal, implicit_gathers
from tests.models import Gpt, Mlp, real, rows, tokens
from tests.passes import examples
from tests.passes.stages import check_documented, shown, stages


def test_the_docstring_shows_a_batch_before_and_after() -> None:
    plan = "mesh dp=2\ndata x over dp\n"
    texts = []
    for each in (plan, plan + "accumulate 4\n"):
        graph = stages(examples.Mlp(), (torch.randn(8, 16),), each)["partition"]
        texts.append([f"mesh {graph.mesh}", *shown(graph, "x", *["slice"] * bool(texts), "linear")])
    check_documented(accumulate, *texts)


@pytest.mark.parametrize("mesh", ["dp=2", "micro=2"])
def test_a_gpt_trains_as_on_one_device(mesh: str) -> None:
    torch.manual_seed(0)
    axis = mesh.split("=")[0]
    plan = f"mesh {mesh}\ndata tokens, targets over {axis}\naccumulate 2\n"
    program = check_equal(Gpt(), tokens, plan)
    assert implicit_gathers(program) == []


def test_microbatches_need_no_ranks() -> None:
    torch.manual_seed(0)
    check_equal(Mlp(), rows, "mesh dp=1\ndata x\naccumulate 4\n")


def test_evaluation_takes_any_batch() -> None:
    torch.manual_seed(0)
    model = Mlp().double()
    plan = meshwright.Plan.parse("mesh dp=2\ndata x over dp\naccumulate 4\n")
    run = meshwright.compile(model, plan, example=rows()).launch()
    x = real(2, 16)
    assert torch.allclose(run.evaluate(x), model.eval()(x))


class Labelled(nn.Module):
    """Some labels are ignored."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.head, self.reduction = nn.Linear(8, 5), reduction

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self.head(x), labels, reduction=self.reduction)
        return loss if self.reduction == "mean" else loss.sum() / (labels != -100).sum()


def uneven() -> tuple[Tensor, Tensor]:
    """Sixteen rows: the first microbatches have hardly any label, and one has none."""
    labels = torch.randint(0, 5, (16,))
    labels[:3] = labels[4:12] = -100
    return real(16, 8), labels


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_microbatches_count_for_as_many_labels_as_they_have(reduction: str, level: int) -> None:
    torch.manual_seed(0)
    plan = "mesh dp=2\ndata x, labels over dp\naccumulate 4\n"
    plan += f"zero {level} over dp\n" if level else ""
    check_equal(Labelled(reduction), uneven, plan)


class Indexed(nn.Module):
    """Takes rows of a table by numbers that it computes, and by those that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 8))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        fixed = torch.arange(16).view(4, 4) % 9
        bias = self.table[fixed.flatten()].view(4, 4, 8).sum(0)
        return (x * self.table[places] + bias.sum(0)).square().mean()


def test_tables_that_are_indexed_have_gradients_of_all_microbatches() -> None:
    torch.manual_seed(0)
    example = lambda: (real(8, 8), torch.randint(0, 9, (8,)))  # noqa: E731
    check_equal(Indexed(), example, "mesh dp=2\ndata x, places over dp\naccumulate 2\n")


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("accumulate-without-data", "mesh dp=2\naccumulate 2\nallow replicate **\n"),
        ("accumulate-odd-batch", "mesh dp=2\ndata tokens, targets over dp\naccumulate 3\n"),
        ("data-over-nothing", "mesh tp=2\ndata tokens, targets\nallow replicate **\n"),
    ],
)
def test_mistakes_are_explained(name: str, plan: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Gpt(), meshwright.Plan.parse(plan), example=tokens())
    golden(name, str(caught.value))

"""The pass `sequence`: activations are split along the sequence between split linears."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

import meshwright
from meshwright import PlanError
from meshwright.compiler.graph.ir import GETITEM
from meshwright.compiler.layout.factors import dim_axes
from meshwright.passes.statements.sequences import split
from tests.equivalence import check_equal, implicit_gathers
from tests.models import real
from tests.passes.examples import Blocks, Body, Mlp, rows, sequences
from tests.passes.stages import check_documented, shown, stages

LINEARS = "columns block.up over tp\nrows block.down over tp\n"


def test_the_docstring_shows_a_region_before_and_after() -> None:
    found = stages(Blocks(), sequences(), "mesh tp=2\n" + LINEARS + "sequence block over tp\n")
    both = "getitem", "linear", "linear_1", "add"
    check_documented(
        split,
        shown(found["normalise"], *both),
        shown(found["partition"], *both, "slice", "all_gather", "reduce_scatter"),
    )


def test_the_batch_may_be_split_too() -> None:
    plan = "mesh dp=2, tp=2\ndata x over dp\n" + LINEARS + "sequence block over tp\n"
    found = stages(Blocks(), sequences(), plan)
    assert shown(found["partition"], "add") == [
        "add: f32[8@dp, 16@tp, 16] = add(slice, reduce_scatter)"
    ]


def test_regions_over_different_axes_stay_apart() -> None:
    plan = "mesh a=2, b=2\n" + LINEARS.replace("tp", "a") + "sequence block over a\n"
    plan += "data x over b\n"
    check_equal(Blocks(), lambda: tuple(x.double() for x in sequences()), plan)


class Several(nn.Module):
    """Two stacks over sequences of one size, as of an encoder and a decoder, or in one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(Body(), Body())
        self.second = Body()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.second(y * self.first(x).mean() + self.first(y)).square().mean()


TWO = """mesh a=2, b=2
columns first.*.up over a
rows first.*.down over a
columns second.up over b
rows second.down over b
"""
REGIONS = {
    "sequence first over a\nsequence second over b": ("aa", "b"),
    "sequence second over b\nsequence first over a": ("aa", "b"),
    "sequence first.1 over a\nsequence second over b": ("-a", "b"),
    "sequence first over a\nsequence first.0 over b\nsequence second over b": ("ba", "b"),
    "sequence first.0 over b\nsequence first over a\nsequence second over b": ("ba", "b"),
    "sequence first over (a, b)\nsequence second over b": ("abab", "b"),
}


@pytest.mark.parametrize("regions", REGIONS)
def test_each_region_splits_its_own_sequences_whatever_size_those_of_others_have(
    regions: str,
) -> None:
    def batch() -> tuple[Tensor, Tensor]:
        return real(4, 8, 16), real(4, 8, 16)

    program = check_equal(Several(), batch, TWO + regions, steps=1)
    norms: dict[str, str] = {}
    for node in program.stages[0].forward.nodes:
        layout = node.layout[0] if isinstance(node.layout, tuple) else node.layout
        if node.op == GETITEM and layout is not None and len(layout.dims) == 3:
            norms.setdefault(node.origin.module, "".join(dim_axes(layout.dims[1])) or "-")
    found = {name: norms[f"{name}.norm"] for name in ("first.0", "first.1", "second")}
    assert ("".join((found["first.0"], found["first.1"])), found["second"]) == REGIONS[regions]


class Seen(nn.Module):
    """A region over the pixels of an image, and a convolution over what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.conv = Body(), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.block(x).transpose(1, 2).unflatten(2, (4, 4))
        return self.conv(pixels).square().mean()


def test_a_sequence_that_becomes_rows_and_columns_is_gathered_as_the_plan_asks() -> None:
    plan = "mesh dp=2, tp=2\ndata x over dp\nsequence block over tp\n"
    program = check_equal(Seen(), lambda: (real(4, 16, 16),), plan, steps=1)
    assert implicit_gathers(program) == []


def test_a_region_that_no_activation_enters_is_explained(
    golden: Callable[[str, str], None],
) -> None:
    plan = meshwright.Plan.parse("mesh tp=2\nsequence up over tp\n")
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Mlp(), plan, example=rows())
    golden("sequence-no-activation", str(caught.value))

"""Experts that a model has, placed on ranks: the same numbers, and rows go where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import meshwright
from meshwright.compiler.composites import owners
from meshwright.compiler.public import Program
from meshwright.dsl.errors import MeshwrightError
from meshwright.passes.experts import place
from meshwright.runtime.errors import OverfullError
from tests.equivalence import check_equal, implicit_gathers
from tests.passes.experts.dense import batch
from tests.passes.experts.stacked import (
    Body,
    Model,
    biased,
    coded,
    dropped,
    gated,
    mixing,
    plain,
    real,
    skewed,
    widened,
)
from tests.passes.experts.test_equal import some
from tests.passes.stages import check_documented, shown, stages

PLACED = "experts blocks.*.experts over ep\n"
OWN = "mesh ep=2\n" + PLACED
DATA = "data x, labels over ep\n"
ALONE = OWN + DATA
PARTS = "mesh dp=2, ep=2\n" + PLACED


def placed(plan: str, model: nn.Module | None = None, *, rows: tuple[int, ...] = (8, 6)) -> Program:
    """Trains under the plan as on one device, and no token leaves its shard of the batch."""
    torch.manual_seed(0)
    program = check_equal(model or Model(), lambda: batch(*rows), plan)
    assert implicit_gathers(program) == []
    if "zero" not in plan:
        assert not any("all_gather" in kind for kind in counts(program))
    return program


def compiled(plan: str, model: nn.Module) -> Program:
    return meshwright.compile(model.double(), meshwright.Plan.parse(plan), example=batch(8, 6))


def counts(program: Program) -> dict[str, int]:
    return dict(program.comm().counts())


def test_the_docstrings_show_products_before_and_after() -> None:
    found = stages(Model(top=1), batch(4, 2), ALONE)
    products = "grouped_mm", "silu", "mul", "grouped_mm_1"
    check_documented(
        place,
        shown(found["experts"], *products),
        shown(found["place_experts"], "owned_groups", "to_owners", *products, "from_owners"),
    )
    counted = "owner_order", "owner_counts", "all_to_all"
    check_documented(
        owners,
        shown(found["differentiate"], "to_owners"),
        shown(found["lower"], *counted, "by_owner_1", "exchange_rows_1", "view_4"),
    )


def test_rows_that_are_split_go_to_experts_and_back_by_one_exchange_in_each_direction() -> None:
    program = placed(ALONE)
    # Two forward with the numbers of experts, and two backward; all go by the same counts.
    assert counts(program)["exchange_rows[ep]"] == 3 + 2
    assert counts(program)["all_to_all[ep]"] == 1
    # The loss, how many labels it is of, and one bucket of the gradients of all but experts.
    assert counts(program)["all_reduce[ep]"] == 3
    weight = program.parameters["blocks.0.experts.up"]
    assert str(weight.layout) == "[4@ep, 8, 16]"


def test_rows_that_are_not_split_are_not_sent() -> None:
    # What experts give; the gradients of what they are given, of the shares that weigh it, and of
    # the vector that all of them use.
    assert counts(placed(OWN)) == {"all_reduce[ep]": 4}


PLANS = {
    "4 ranks": ALONE.replace("ep=2", "ep=4"),
    "part of data": PARTS + "data x, labels over (dp, ep)",
    "first part of data": PARTS + "data x, labels over (ep, dp)",
    "own axis": PARTS + "data x, labels over dp",
    "two axes": PARTS.replace("over ep", "over (dp, ep)") + "data x, labels over (dp, ep)",
    "two axes in another order": PARTS.replace("over ep", "over (ep, dp)")
    + "data x, labels over (dp, ep)",
    "microbatches": ALONE + "accumulate 2",
    "microbatches and data": PARTS + "data x, labels over (ep, dp)\naccumulate 2",
    "one rank": ALONE.replace("ep=2", "ep=1"),
}


FAST = ("own axis", "two axes in another order", "microbatches and data")


@pytest.mark.parametrize("plan", some(PLANS, FAST))
def test_experts_of_a_model_are_the_same_on_any_mesh(plan: str) -> None:
    placed(plan)


FEATURES = """
shard blocks.*.experts.up [e, d, f@tp]
shard blocks.*.experts.down [e, f@tp, d]
shard blocks.*.experts.scale [f@tp]
"""
TOGETHER = {
    "features": ALONE.replace("ep=2", "ep=2, tp=2") + FEATURES,
    "zero 1": PARTS + "data x, labels over (dp, ep)\nzero 1 over (dp, ep)",
    "zero 2": PARTS + "data x, labels over (dp, ep)\nzero 2 over dp",
    "zero 3": PARTS + "data x, labels over (dp, ep)\nzero 3 over dp",
    "checkpoint": ALONE + "checkpoint blocks.*",
    "stages": ALONE.replace("ep=2", "pp=2, ep=2", 1) + "stages at blocks.1 over pp microbatches=2",
}


def test_one_rank_multiplies_rows_in_the_order_of_tokens() -> None:
    forward = str(compiled(ALONE.replace("ep=2", "ep=1"), Model()).graph("stage0.forward"))
    assert "grouped_mm" in forward
    assert "owners" not in forward


@pytest.mark.parametrize("plan", some(TOGETHER, ("features", "zero 3", "checkpoint")))
def test_placed_experts_go_with_other_statements(plan: str) -> None:
    placed(plan, Model(2 if "stages" in plan else 1))


@pytest.mark.parametrize("plan", some({"split": ALONE, "own": OWN}, ("split", "own")))
@pytest.mark.parametrize("body", [biased, gated])
def test_what_experts_do_row_by_row_is_done_where_they_are(body: Body, plan: str) -> None:
    program = placed(plan, Model(body=body, top=1))
    sent = counts(program).get("exchange_rows[ep]", 0)
    assert sent == (5 if plan == ALONE else 0)
    assert str(program.parameters["blocks.0.experts.up_bias"].layout) == "[4@ep, 16]"


def test_rows_that_are_compared_between_products_come_back_for_it() -> None:
    program = placed(ALONE, Model(body=mixing))
    assert counts(program)["exchange_rows[ep]"] == 5 + 2


def test_what_is_told_how_many_rows_there_are_is_done_in_their_order() -> None:
    placed(ALONE, Model(body=widened))


def test_a_table_that_is_not_by_expert_is_looked_up_in_the_order_of_tokens() -> None:
    model = Model(body=coded)
    model.blocks[0].experts.codes = real(8, 16)
    program = placed(ALONE, model)
    assert str(program.parameters["blocks.0.experts.codes"].layout) == "[8, 16]"


def test_random_numbers_inside_experts_are_those_of_one_rank() -> None:
    torch.manual_seed(0)
    model, sample = Model(body=dropped), batch(8, 6)
    losses = []
    for plan in (ALONE.replace("ep=2", "ep=1"), ALONE, OWN):
        with compiled(plan, model).launch() as run:
            torch.manual_seed(1)
            losses.append(run.step(*sample))
    torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plan", [ALONE, OWN, ALONE.replace("ep=2", "ep=4")])
@pytest.mark.parametrize("expert", [0, 3])
def test_all_rows_may_go_to_one_rank_and_none_to_another(expert: int, plan: str) -> None:
    program = placed(plan, skewed(expert))
    run = program.launch()
    run.step(*batch(8, 6))
    used = run.gradients()["blocks.0.experts.up"].abs().sum((1, 2)) > 0
    assert used.tolist() == [each == expert for each in range(4)]


def test_a_maximum_is_less_memory_and_an_error_where_it_is_too_little(
    golden: Callable[[str, str], None],
) -> None:
    limited = ALONE.replace("over ep\n", "over ep maximum=1.5\n", 1)
    program, whole = compiled(limited, skewed(0)), compiled(ALONE, skewed(0))
    assert program.memory().activations < whole.memory().activations
    sample = batch(8, 6)
    with program.launch() as run, pytest.raises(OverfullError) as caught:
        run.step(*sample)
    golden("placed-overfull", str(caught.value))
    # 48 rows come to one of two ranks.
    enough = compiled(limited.replace("1.5", "2"), skewed(0))
    with enough.launch() as run, whole.launch() as other:
        assert torch.equal(run.step(*sample), other.step(*sample))
    placed(limited.replace("1.5", "1.9"), Model(top=1))
    alone = compiled(limited.replace(DATA, ""), skewed(0))
    with alone.launch() as run, pytest.raises(MeshwrightError, match=r"48 rows .* room for 36"):
        run.step(*sample)


def test_a_statement_may_name_the_block_around_experts() -> None:
    by_block = placed(ALONE.replace("blocks.*.experts", "blocks.*"))
    assert counts(by_block) == counts(placed(ALONE))


def test_experts_of_two_statements_may_be_on_different_axes() -> None:
    plan = "mesh dp=2, ep=2\ndata x, labels over (dp, ep)\n"
    plan += "experts blocks.0 over ep\nexperts blocks.1 over dp\n"
    program = placed(plan, Model(2))
    assert counts(program)["exchange_rows[ep]"] == counts(program)["exchange_rows[dp]"] == 5


@pytest.mark.parametrize("plan", [ALONE, OWN])
def test_formulas_of_placed_experts_give_what_is_counted(plan: str) -> None:
    program = compiled(plan, Model(body=biased))
    cost = program.cost()
    assert cost.sent().number == program.comm().total_bytes()
    assert cost.memory().number == program.memory().peak


REFUSED: dict[str, tuple[str, Body]] = {
    "placed-no-experts": (ALONE.replace("blocks.*.experts", "blocks.*.router"), plain),
    "placed-do-not-divide": (ALONE.replace("ep=2", "ep=3"), plain),
    "placed-laid-out-otherwise": (
        PARTS + "shard blocks.*.experts.up [e@dp, d, f]\ndata x, labels over dp", plain
    ),
    "placed-axis-used-twice": (ALONE + "shard blocks.*.experts.up [e, d, f@ep]", plain),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_placed_is_explained(name: str, golden: Callable[[str, str], None]) -> None:
    plan, body = REFUSED[name]
    with pytest.raises(MeshwrightError) as caught:
        meshwright.compile(Model(body=body), meshwright.Plan.parse(plan), example=batch(12, 6))
    golden(name, str(caught.value))

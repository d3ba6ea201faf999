"""`memory budget=SIZE`: one decision over all that the plan leaves open."""

from __future__ import annotations

import re

import pytest
import torch

import meshwright
from meshwright.compiler.public import Program
from meshwright.dsl.errors import PlanError
from meshwright.passes import driver
from meshwright.passes.budgets import joint, rates
from tests.models import GPT_DATA, Gpt, tokens

MODEL, BATCH = Gpt(layers=2), tokens()
BASE = f"mesh dp=2\n{GPT_DATA}"
DEEP, LONG = Gpt(layers=4, d=16).double(), tokens(batch=32)
SAID = f"{BASE}zero 1 over dp\naccumulate 1\n"


def compiled(plan: str, model: Gpt = MODEL) -> Program:
    batch = BATCH if model is MODEL else LONG
    return meshwright.compile(model, meshwright.Plan.parse(plan), batch)


def peak(program: Program) -> int:
    return max(each.peak for each in program.memories().values())


def chosen(program: Program) -> str:
    assert program.budgeted is not None
    return "".join(f"{each}\n" for each in program.budgeted.statements)


def least(plan: str, model: Gpt = MODEL, verb: str = "memory") -> str:
    """The budget that an error names."""
    with pytest.raises(PlanError) as caught:
        compiled(f"{plan}{verb} budget=1KiB\n", model)
    (found,) = re.findall(r"`(budget=\S+)` or more", caught.value.help)
    return str(found)


def size(budget: str) -> int:
    """The bytes of such a budget."""
    (number,) = re.findall(r"=(\d+)KiB", budget)
    return 1024 * int(number)


def test_nothing_is_added_where_the_plan_fits_and_what_costs_nothing_comes_first() -> None:
    whole = compiled(BASE).memory().peak
    assert chosen(compiled(f"{BASE}memory budget={whole}B\n")) == ""
    # The same bytes are sent under `zero 1` as without.
    assert chosen(compiled(f"{BASE}memory budget={whole - 1}B\n")) == "zero 1 over dp\n"


@pytest.mark.slow
def test_what_was_chosen_fits_and_is_a_plan_that_gives_the_same_program() -> None:
    split = compiled(f"{BASE}zero 1 over dp\n").memory().peak
    budget = int(0.85 * split)
    program = compiled(f"{BASE}memory budget={budget}B\n")
    assert program.memory().peak <= budget
    assert "checkpoint blocks" in chosen(program)
    pasted = compiled(BASE + chosen(program))
    assert pasted.digest == program.digest
    one, other = program.launch(seed=1), compiled(BASE).launch(seed=1)
    torch.testing.assert_close(one.step(*BATCH), other.step(*BATCH))
    assert one.evaluate(*BATCH).isfinite()


@pytest.mark.slow
def test_what_the_plan_says_stays_and_state_is_kept_elsewhere_if_nothing_else_fits() -> None:
    said = f"{BASE}zero 2 over dp\naccumulate 2\n"
    program = compiled(f"{said}memory {least(said)}\n")
    assert "offload" in chosen(program)
    assert "zero" not in chosen(program) and "accumulate" not in chosen(program)


@pytest.mark.slow
def test_each_kind_of_choice_is_taken_for_some_budget_and_a_smaller_one_costs_no_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "MOVED", 10)  # copies as fast as a model this small computes
    whole = compiled(BASE, DEEP)
    expected = whole.launch(seed=1)
    loss, gradients = expected.step(*LONG), expected.gradients()
    taken, costs = "", [joint._cost(whole)]
    smallest = size(least(BASE, DEEP))
    for share in (0.999, 0.6, 0.35, 0.2):
        budget = max(int(peak(whole) * share), smallest)
        program = compiled(f"{BASE}memory budget={budget}B\n", DEEP)
        assert peak(program) <= budget
        pasted = compiled(BASE + chosen(program), DEEP)
        assert pasted.digest == program.digest and peak(pasted) == peak(program)
        run = program.launch(seed=1)
        torch.testing.assert_close(run.step(*LONG), loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(run.gradients(), gradients, rtol=1e-11, atol=1e-15)
        taken += chosen(program)
        costs.append(joint._cost(program))
    assert costs == sorted(costs)
    for kind in ("zero", "accumulate", "checkpoint", "offload activations blocks", "offload p"):
        assert f"\n{kind}" in f"\n{taken}"


@pytest.mark.slow
def test_what_is_computed_again_and_what_is_elsewhere_is_one_choice_of_the_same_bits() -> None:
    smaller = int(0.97 * size(least(SAID, DEEP, "checkpoint")))
    budget = f"budget={smaller}B"
    program = compiled(f"{SAID}checkpoint {budget}\noffload activations {budget}\n", DEEP)
    assert "checkpoint blocks" in chosen(program)
    assert "offload activations blocks" in chosen(program)
    assert peak(program) <= smaller
    one, other = (compiled(SAID, DEEP).launch(seed=1), program.launch(seed=1))
    assert torch.equal(one.step(*LONG), other.step(*LONG))
    assert all(map(torch.equal, one.gradients().values(), other.gradients().values()))


@pytest.mark.slow
def test_few_choices_are_compiled_where_no_budget_can_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried, compile_captured = [], driver.compile_captured
    monkeypatch.setattr(
        driver,
        "compile_captured",
        lambda *args, **options: tried.append(args) or compile_captured(*args, **options),
    )
    assert least(BASE)
    assert len(tried) <= 10


@pytest.mark.slow
def test_microbatches_of_a_pipeline_are_open_where_stages_do_not_say_them() -> None:
    base = "mesh pp=2\ndata tokens, targets\nstages at blocks.2 over pp"
    whole = peak(compiled(f"{base}\n", DEEP))
    program = compiled(f"{base}\nmemory budget={whole // 2}B\n", DEEP)
    assert peak(program) <= whole // 2
    said = compiled(f"{base} microbatches=2\nmemory budget={whole // 2}B\n", DEEP)
    assert "accumulate" in chosen(program) and "accumulate" not in chosen(said)
    assert compiled(f"{base}\n{chosen(program)}", DEEP).digest == program.digest

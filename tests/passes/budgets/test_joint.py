"""`memory budget=SIZE`: one decision over all that the plan leaves open."""

from __future__ import annotations

import re

import pytest
import torch

import meshwright
from meshwright.compiler.public import Program
from meshwright.dsl.errors import PlanError
from tests.models import GPT_DATA, Gpt, tokens

MODEL, BATCH = Gpt(layers=2), tokens()
BASE = f"mesh dp=2\n{GPT_DATA}"


def compiled(plan: str) -> Program:
    return meshwright.compile(MODEL, meshwright.Plan.parse(plan), BATCH)


def chosen(program: Program) -> str:
    assert program.budgeted is not None
    return "".join(f"{each}\n" for each in program.budgeted.statements)


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
    with pytest.raises(PlanError) as caught:
        compiled(f"{said}memory budget=1KiB\n")
    (least,) = re.findall(r"`(budget=\S+)` or more", caught.value.help)
    program = compiled(f"{said}memory {least}\n")
    assert "offload" in chosen(program)
    assert "zero" not in chosen(program) and "accumulate" not in chosen(program)

"""What is said of a module: its share of what is sent together, as often as a step sends it."""

from __future__ import annotations

from collections import Counter

import pytest

import meshwright as mw
from meshwright.dsl.statements import Zero
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens

PLAN = f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}sequence blocks.* over tp\n"


@pytest.fixture(scope="module", params=["", "zero 3 over dp\n", "zero 2 over dp\naccumulate 2\n"])
def program(request: pytest.FixtureRequest) -> mw.Program:
    return mw.compile(Gpt(layers=2), mw.Plan.parse(PLAN + request.param), tokens())


def test_what_the_model_sends_is_what_its_program_sends(program: mw.Program) -> None:
    whole, comm = program.explain("").whole, program.comm()
    assert whole is not None
    assert (whole.sent, whole.collectives) == (comm.total_bytes(), comm.times())
    counted = {f"{each.kind}[{', '.join(each.axes)}]": 0 for each in program.explain("").sums}
    for each in program.explain("").sums:
        counted[f"{each.kind}[{', '.join(each.axes)}]"] += each.count
    assert counted == comm.counts()


def test_every_weight_has_the_collectives_that_carry_it(program: mw.Program) -> None:
    zero = program.plan.of(Zero)
    for name in program.parameters:
        found = [each for each in program.explain(name).collectives if "dp" in each.axes]
        kinds = Counter(each.kind for each in found)
        if zero:
            assert kinds["all_gather"] in range(1, zero[0].level), name
            assert kinds["reduce_scatter"] == 1, name
            assert {each.plan_line for each in found} == {zero[0].plan_line}
        else:
            assert kinds == {"all_reduce": 1}, name


def test_shares_of_what_is_sent_together_add_up(program: mw.Program) -> None:
    parts = program.explain("blocks.0")
    assert parts.whole is not None
    own = [each for each in program.comm() if each.module == "blocks.0" and each.operands == 1]
    inside = sum(each.sent for each in parts.children)
    assert abs(inside + sum(e.bytes * e.times for e in own) - parts.whole.sent) <= 16

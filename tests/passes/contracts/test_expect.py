"""The pass `expect`: contracts on the compiled program."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import meshwright
from meshwright import PlanError
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens

PLAN = "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR


def compiled(contract: str) -> None:
    meshwright.compile(Gpt(), meshwright.Plan.parse(PLAN + contract), example=tokens())


@pytest.mark.parametrize(
    "contract",
    [
        "expect all_reduce[tp] == 4 per blocks.*",
        "expect all_reduce[tp] == 2 forward per blocks.*",
        "expect all_reduce[tp] == 2 backward per blocks.*",
        "expect all_gather == 0",
        "expect all_reduce[tp] <= 8 step",
        "expect bytes[tp] <= 1MiB",
        "expect peak_memory <= 1GiB",
    ],
)
def test_contracts_that_hold_let_the_plan_compile(contract: str) -> None:
    compiled(contract)


@pytest.mark.parametrize(
    ("name", "contract"),
    [
        ("expect-count", "expect all_reduce[tp] == 3 per blocks.*"),
        ("expect-bytes", "expect bytes[tp] <= 1"),
        ("expect-memory", "expect peak_memory <= 1KiB"),
        ("expect-every-digit", "expect peak_memory == 123456789"),
        ("expect-no-such-module", "expect all_reduce[tp] == 3 per block.*"),
    ],
)
def test_a_broken_contract_shows_the_number_found(
    name: str, contract: str, golden: Callable[[str, str], None]
) -> None:
    with pytest.raises(PlanError) as caught:
        compiled(contract)
    golden(name, str(caught.value))

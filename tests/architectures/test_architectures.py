"""Hugging Face architectures train under the plans of `examples/plans`."""

from __future__ import annotations

import pytest

import meshwright as mw
from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.matrix import PLANS, check_architecture, plan_of

FEW = [
    ("opt", "all"),
    ("falcon_new", "tensor"),
    ("modernbert", "all"),
    ("mpnet", "vocab"),
    ("whisper", "sequence"),
]


@pytest.mark.parametrize(("name", "column"), FEW)
def test_an_architecture_trains_under_its_plan_as_in_eager_mode(name: str, column: str) -> None:
    check_architecture(ARCHITECTURES[name], plan_of(name, column))


def test_every_architecture_has_a_plan() -> None:
    assert {path.stem for path in PLANS.glob("*.plan")} == set(ARCHITECTURES)


def test_no_plan_names_a_layer_by_its_number() -> None:
    for path in PLANS.glob("*.plan"):
        for each in mw.Plan.load(path).statements:
            for target in getattr(each, "targets", ()):
                assert not any(part.isdigit() for part in str(target).split(".")), path.name

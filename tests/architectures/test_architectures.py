"""Hugging Face architectures train under the plans of `examples/plans` as docs/models.md says."""

from __future__ import annotations

import pytest

import meshwright as mw
from tests.architectures.__main__ import main
from tests.architectures.catalogue import ARCHITECTURES
from tests.architectures.matrix import PLANS, Outcome, check_architecture, plan_of
from tests.architectures.page import PAGE

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


def test_every_architecture_has_a_plan_and_a_line_on_the_page() -> None:
    assert {path.stem for path in PLANS.glob("*.plan")} == set(ARCHITECTURES)
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"](../examples/plans/{name}.plan) |" in page for name in ARCHITECTURES)


def test_no_plan_names_a_layer_by_its_number() -> None:
    for path in PLANS.glob("*.plan"):
        for each in mw.Plan.load(path).statements:
            for target in getattr(each, "targets", ()):
                assert not any(part.isdigit() for part in str(target).split(".")), path.name


@pytest.mark.parametrize(("word", "code"), [("equal", 0), ("**wrong**", 1), ("**TypeError**", 1)])
def test_an_error_that_is_not_ours_is_no_better_than_a_wrong_number(
    word: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.architectures.__main__.outcome", lambda *_: Outcome(word))
    assert main(["llama"]) == code


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_page_says_what_holds_of_an_architecture(name: str) -> None:
    assert main([name, "--check"]) == 0

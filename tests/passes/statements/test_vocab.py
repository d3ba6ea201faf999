"""The pass `vocab`: embeddings and heads are split over the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import meshwright
from meshwright import PlanError
from meshwright.passes.statements import vocab
from tests.passes.examples import Lm, labelled
from tests.passes.stages import check_documented, shown, stages

PLAN = "mesh tp=2\nvocab wte, head over tp\n"


def test_the_docstring_shows_a_table_and_a_head_before_and_after() -> None:
    found = stages(Lm(), labelled(), PLAN)
    before = "wte_weight", "head_weight", "embedding", "linear"
    check_documented(
        vocab,
        shown(found["normalise"], *before),
        shown(found["partition"], *before, "all_reduce"),
    )


def test_logits_stay_split_into_the_loss() -> None:
    program = meshwright.compile(Lm(), meshwright.Plan.parse(PLAN), example=labelled())
    text = str(program.graph("stage0.forward"))
    assert "f32[8, 96@tp] = linear(" in " ".join(text.split())
    assert "mesh::cross_entropy_stats(linear" in text


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("vocab-no-table", "mesh tp=2\nvocab norm over tp\n"),
        ("vocab-of-a-parent", "mesh tp=2\nvocab blocks over tp\n"),
    ],
)
def test_mistakes_are_explained(name: str, plan: str, golden: Callable[[str, str], None]) -> None:
    from tests.models import Gpt, tokens

    plan = plan.replace("norm", "ln")
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Gpt(), meshwright.Plan.parse(plan), example=tokens())
    golden(name, str(caught.value))

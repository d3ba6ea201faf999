"""The pass `lower`: split composites become local steps and the collectives between them."""

from __future__ import annotations

from meshwright.passes import lower
from tests.passes.examples import Lm, labelled
from tests.passes.stages import check_documented, shown, stages


def test_the_docstring_shows_a_loss_before_and_after() -> None:
    found = stages(Lm(), labelled(), "mesh tp=2\nvocab head over tp\n")
    check_documented(
        lower,
        shown(found["differentiate"], "linear", "cross_entropy"),
        shown(
            found["lower"],
            *("linear", "cross_entropy_stats", "all_gather_replicated", "cross_entropy_combine"),
        ),
    )


def test_what_is_whole_stays_one_operator() -> None:
    found = stages(Lm(), labelled(), "mesh dp=2\ndata tokens, targets over dp\n")
    names = [node.name for node in found["lower"].nodes]
    assert "cross_entropy" in names
    assert not any("stats" in name for name in names)

"""`checkpoint SEL split=tp`: ranks along an axis each keep a part of what regions save."""

from __future__ import annotations

import pytest
import torch

from meshwright.compiler.graph.ir import OutputKind, Phase
from meshwright.passes.statements import split_saved
from tests.models import GPT_TENSOR, Gpt, tokens
from tests.passes.stages import check_documented, shown
from tests.passes.statements.test_checkpoint import STAGES, TENSOR, compiled, trained

ONE = f"mesh tp=4\n{GPT_TENSOR}vocab wte, head over tp\n"
PLANS = {
    "data": f"{TENSOR}zero 3 over dp\naccumulate 2\n",
    "pipeline": f"mesh pp=2, tp=2\ndata tokens, targets\n{GPT_TENSOR}{STAGES}",
    "offload": f"{TENSOR}offload activations\n",
}


@pytest.mark.parametrize(
    "name", ["data", *(pytest.param(n, marks=pytest.mark.slow) for n in ("pipeline", "offload"))]
)
def test_all_bits_are_those_of_a_step_that_saves_the_whole(name: str) -> None:
    whole = compiled(f"{PLANS[name]}checkpoint blocks.*\n")
    parts = compiled(f"{PLANS[name]}checkpoint blocks.* split=tp\n")
    assert all(map(torch.equal, trained(parts), trained(whole)))


def test_the_docstring_shows_a_value_that_is_saved_in_parts() -> None:
    names = "add_2_1", "slice_2", "add_2_1_part", "add_3_1_again"
    before, after = (
        [
            line
            for graph in compiled(f"{ONE}checkpoint blocks.*{more}\n").graphs().values()
            for line in shown(graph, *(n.name for n in graph.nodes if n.name in names))
        ]
        for more in ("", " split=tp")
    )
    check_documented(split_saved, before, after)


def test_what_regions_save_shrinks_as_ranks_grow() -> None:
    """The inputs of blocks, and the sums in the middle of each, which are not sent again."""
    model, batch = Gpt(d=32, layers=4), tokens(batch=16)
    whole = compiled(f"{ONE}checkpoint blocks.*\n", model, batch)
    parts = compiled(f"{ONE}checkpoint blocks.* split=tp\n", model, batch)
    value = 16 * 8 * 32 * 4
    saved = parts.stages[0].forward.outputs_of(OutputKind.SAVED)
    names = [each.node.name for each in saved if each.node.name.endswith("_part")]
    # The last block's output is split as well; the norm's result behind it is in no region.
    assert len(names) == 2 * 4 + 1
    assert whole.memory().activations - parts.memory().activations == 9 * value * 3 // 4
    sent = parts.comm().total_bytes() - whole.comm().total_bytes()
    assert sent == 9 * value * 3 // 4


def test_a_part_is_gathered_right_before_it_is_taken() -> None:
    """It would begin with the graph otherwise, and all of them be held from there on."""
    program = compiled(f"{ONE}checkpoint blocks.* split=tp\n", Gpt(layers=4), tokens(batch=16))
    order = program.stages[0].graphs[Phase.BACKWARD].nodes
    gathers = [node for node in order if node.kwargs.get("after") is not None]
    assert len(gathers) == 9
    for each in gathers:
        place, after = order.index(each), order.index(each.kwargs["after"])
        assert place - after < 8


@pytest.mark.parametrize("more", ["sequence blocks.* over tp\n", ""])
def test_what_is_split_or_divides_nowhere_stays_as_it_is(more: str) -> None:
    """Of three rows of three tokens, or of a sequence that is split already."""
    plan = f"mesh tp=2\n{GPT_TENSOR}vocab wte, head over tp\n{more}checkpoint blocks.*"
    batch = tokens(batch=4) if more else tuple(each[:, :3] for each in tokens(batch=3))
    whole, parts = (compiled(f"{plan}{s}\n", Gpt(d=24), batch) for s in ("", " split=tp"))
    expected = 0 if more else 24 * 9 * 4 // 2 * 5
    assert whole.memory().activations - parts.memory().activations == expected

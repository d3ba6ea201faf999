"""The pass `separate`: forward and backward, and what is handed over."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.graph.ir import Graph, OutputKind, Phase
from meshwright.passes import separate as passed
from meshwright.passes.needs import Needs
from meshwright.passes.separate import separate_graph
from meshwright.passes.statements.checkpoint import Regions
from tests.passes.examples import Blocks, Mlp, rows, sequences
from tests.passes.stages import check_documented, shown, stages

STEP = (Phase.FORWARD, Phase.BACKWARD)
SEQUENCE = "mesh tp=2\ncolumns block.up over tp\nrows block.down over tp\nsequence block over tp"


def saved(graph: Graph) -> list[str]:
    """What a forward hands over, in the order of the list."""
    return [saved.node.name for saved in graph.outputs_of(OutputKind.SAVED)]


def popped(graph: Graph) -> list[str]:
    """What a backward takes, in order."""
    return [node.name for node in graph.nodes if node.op.name == "saved"]  # type: ignore[union-attr]


def test_the_docstring_shows_a_saved_value_before_and_after() -> None:
    joint = stages(Mlp(), rows(), "mesh tp=2\ncolumns up over tp\nrows down over tp\n")["bucket"]
    names = "linear", "relu", "threshold_backward"
    needs = Needs(joint, STEP, lambda node: False, Regions({}, joint))
    parts = separate_graph(joint, "stage0", needs)
    forward, backward = parts.values()
    check_documented(
        passed,
        shown(joint, *names),
        [*shown(forward, *names[:2]), *shown(backward, *names[1:])],
    )


@pytest.mark.parametrize("keep", ["", " keep=[all_gather]"])
def test_a_gathered_sequence_is_saved_as_a_shard_unless_it_is_kept(keep: str) -> None:
    plan = meshwright.Plan.parse(SEQUENCE + keep)
    program = meshwright.compile(Blocks(), plan, example=sequences())
    forward = program.stages[0].forward
    assert ("all_gather" in saved(forward)) == bool(keep)
    gathers = [each for each in program.comm() if each.kind == "all_gather"]
    assert [each.phase for each in gathers].count("backward") == (1 if keep else 2)


def test_values_are_popped_from_the_end_in_the_order_of_the_backward() -> None:
    program = meshwright.compile(Blocks(), meshwright.Plan.parse(SEQUENCE), example=sequences())
    forward, backward = program.graphs().values()
    in_order: Sequence[str] = saved(forward)[::-1]
    assert list(in_order) == popped(backward)


class Headed(nn.Module):
    """A loss over the last entries, which may be read elsewhere too."""

    def __init__(self, also: str) -> None:
        super().__init__()
        self.head, self.also = nn.Linear(16, 16, bias=False), also

    def forward(self, x: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = self.head(x)
        loss = F.cross_entropy(logits, targets)
        if self.also == "backward":
            loss = loss + logits.square().mean()
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("also", ["", "backward", "output"])
def test_a_backward_overwrites_what_nothing_else_reads(also: str) -> None:
    example = torch.randn(8, 16), torch.randint(0, 16, (8,))
    plan = meshwright.Plan.parse("mesh dp=1\n")  # over ranks an output is gathered
    outputs = ["logits"] if also == "output" else []
    program = meshwright.compile(Headed(also), plan, example, outputs=outputs)
    found = [node for node in program.stages[0].graphs[Phase.BACKWARD].nodes if node.kwargs]
    assert any("overwrite" in node.kwargs for node in found) == (not also)

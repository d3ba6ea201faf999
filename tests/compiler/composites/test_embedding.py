"""The composite `embedding` where the rows of its table are split."""

from __future__ import annotations

from meshwright.compiler.composites.embedding import EmbeddingBackward
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens
from tests.passes.stages import stages


def test_each_rank_computes_the_gradient_of_its_own_rows() -> None:
    found = stages(
        Gpt(), tokens(), "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + "vocab wte over tp\n"
    )
    nodes = [node for node in found["differentiate"].nodes if node.op == EmbeddingBackward.op]
    assert {str(node.layout) for node in nodes} == {
        "[8, 24] partial(dp)",
        "[48@tp, 24] partial(dp)",
    }

"""Plans send what Megatron does, layer by layer, and nothing that they do not ask for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import meshwright
from meshwright.compiler.public import Program
from tests.equivalence import implicit_gathers
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, Mlp, rows, tokens

Counts = dict[tuple[str, str, str], int]

TENSOR: Counts = {("forward", "all_reduce", "tp"): 2, ("backward", "all_reduce", "tp"): 2}
KEPT: Counts = {
    ("forward", "all_gather", "tp"): 2,
    ("forward", "reduce_scatter", "tp"): 2,
    ("backward", "all_gather", "tp"): 2,
    ("backward", "reduce_scatter", "tp"): 2,
}
# The shard is what is saved: the backward gathers once more for each split column input.
SEQUENCE: Counts = KEPT | {("backward", "all_gather", "tp"): 4}

GPT_VOCAB = "vocab wte, head over tp\n"
GPT_SEQUENCE = "sequence blocks.* over tp\n"
GPT_KEPT = "sequence blocks.* over tp keep=[all_gather]\n"
LLAMA_TENSOR = """
columns model.layers.*.self_attn.{q,k,v}_proj over tp
rows model.layers.*.self_attn.o_proj over tp
columns model.layers.*.mlp.{gate,up}_proj over tp
rows model.layers.*.mlp.down_proj over tp
"""
LLAMA_SEQUENCE = "sequence model.layers.* over tp\n"
LLAMA_VOCAB = "vocab model.embed_tokens, lm_head over tp\n"


def compiled(model: nn.Module, example: Any, plan: str) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), example=example)


def counts(program: Program, module: str) -> Counts:
    """How many collectives a module and what is inside it have, by phase, kind and axes."""
    moved = program.comm().under(module)
    return dict(Counter((each.phase, each.kind, ", ".join(each.axes)) for each in moved))


def gradient_buckets(program: Program) -> list[str]:
    """The types of what is reduced outside of every module's own collectives, in the backward."""
    return [each.type for each in program.comm() if each.module == "gradients"]


@pytest.mark.parametrize(
    ("extra", "layer"),
    [
        ("", TENSOR),
        (GPT_VOCAB, TENSOR),
        (GPT_SEQUENCE, SEQUENCE),
        (GPT_SEQUENCE + GPT_VOCAB, SEQUENCE),
        (GPT_KEPT, KEPT),
    ],
)
def test_a_gpt_layer_has_megatrons_collectives(extra: str, layer: Counts) -> None:
    program = compiled(Gpt(), tokens(), "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + extra)
    for name in ("blocks.0", "blocks.1"):
        assert counts(program, name) == layer
    assert implicit_gathers(program) == []


@pytest.mark.parametrize(
    ("extra", "layer"),
    [("", TENSOR), (LLAMA_SEQUENCE, SEQUENCE), (LLAMA_SEQUENCE + LLAMA_VOCAB, SEQUENCE)],
)
def test_separate_linears_of_one_input_share_its_collectives(extra: str, layer: Counts) -> None:
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    batch = {"input_ids": torch.randint(0, 128, (4, 16)), "labels": torch.randint(0, 128, (4, 16))}
    plan = "mesh dp=2, tp=2\ndata input_ids, labels over dp\n" + LLAMA_TENSOR + extra
    program = compiled(transformers.LlamaForCausalLM(config), batch, plan)
    for name in ("model.layers.0", "model.layers.1"):
        assert counts(program, name) == layer
    assert implicit_gathers(program) == []


def test_data_parallel_gradients_are_one_bucket() -> None:
    program = compiled(Gpt(), tokens(), "mesh dp=4\n" + GPT_DATA)
    size = sum(parameter.numel() for parameter in Gpt().parameters())
    assert gradient_buckets(program) == [f"f32[{size}] partial(dp)"]
    # Besides it, the labels are counted and the loss is summed.
    assert program.comm().counts() == {"all_reduce[dp]": 3}


def test_the_gradients_of_norms_and_row_biases_are_one_bucket_under_sequence() -> None:
    plan = "mesh tp=4\n" + GPT_TENSOR + GPT_SEQUENCE + GPT_VOCAB
    program = compiled(Gpt(), tokens(), plan)
    whole = [p for n, p in Gpt().named_parameters() if ".ln" in n or n.startswith("ln")]
    biases = [p for n, p in Gpt().named_parameters() if "proj.bias" in n or "down.bias" in n]
    size = sum(p.numel() for p in (*whole, *biases, Gpt().wpe.weight))
    reduced = [t for t in gradient_buckets(program) if "partial" in t]
    assert reduced == [f"f32[{size}] partial(tp)"]


def test_a_head_that_is_whole_keeps_the_sequence_split() -> None:
    plan = "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + GPT_SEQUENCE
    program = compiled(Gpt(), tokens(), plan)
    outside = [each for each in program.comm() if not any("blocks" in m for m in each.modules)]
    assert {each.kind for each in outside} == {"all_reduce"}
    assert "f32[8@dp·8@tp, 48]" in str(program.graph("stage0.forward"))


def test_a_vocabulary_split_head_sends_two_numbers_a_row() -> None:
    plan = "mesh dp=2, tp=4\n" + GPT_DATA + GPT_TENSOR + GPT_VOCAB
    program = compiled(Gpt(), tokens(), plan)
    gathers = [each for each in program.comm() if each.kind == "all_gather"]
    assert [each.type for each in gathers] == ["f32[4@tp, 2, 64@dp]"]


@pytest.mark.parametrize("model", [Gpt, Mlp])
def test_frozen_parameters_send_nothing(model: Any) -> None:
    frozen = model()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("down" in name)
    if model is Gpt:
        program = compiled(frozen, tokens(), "mesh dp=4\n" + GPT_DATA)
    else:
        program = compiled(frozen, rows(), "mesh dp=4\ndata x over dp\n")
    size = sum(p.numel() for p in frozen.parameters() if p.requires_grad)
    assert gradient_buckets(program) == [f"f32[{size}] partial(dp)"]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(16, 32)
        self.c = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.c.bias
        return self.c(torch.tanh(self.a(h)) * self.b(h)).square().mean()


def test_two_users_of_a_varying_value_share_its_all_reduce() -> None:
    plan = "mesh tp=2\ncolumns a, b over tp\nrows c over tp\n"
    program = compiled(Shared(), rows(), plan)
    assert program.comm().counts() == {"all_reduce[tp]": 2}

"""Whole models, unmodified: a captured graph computes what eager mode does, gradients too."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.compiler.capture.capture import capture
from tests.compiler.interpreter import check_equal_to_eager, output_labels, run

aten = torch.ops.aten
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 64, "max_position_embeddings": 32}


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.ln1, self.ln2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    def __init__(self, vocab: int = 96, d: int = 24, layers: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(16, d)
        self.blocks = nn.ModuleList(Block(d, 4) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1), targets.flatten())


def text() -> dict[str, Tensor]:
    tokens = torch.randint(0, 96, (2, 8))
    labels = tokens.clone()
    labels[1, :5] = -100
    return {"input_ids": tokens, "labels": labels}


def image() -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64),
        "labels": torch.tensor([1, 2]),
    }


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=4,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)),
        text,
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        ),
        text,
    ),
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL)), text),
    "qwen3": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
        text,
    ),
    "t5": (t5, text),
    "vit": (vit, image),
}


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_models_in_training_equal_eager_mode(name: str) -> None:
    torch.manual_seed(0)
    make, example = MODELS[name]
    model = make().double().train()
    # Norms and rotary embeddings compute in float32 there, in the same order as in eager mode.
    captured = check_equal_to_eager(model, example(), loss=lambda output: output.loss)
    assert captured.input_names == tuple(example())
    assert output_labels(captured) == ("loss",)


def test_a_gpt_equals_eager_mode_and_keeps_its_operators_whole() -> None:
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, 96, (2, 16)), torch.randint(0, 96, (2, 16))
    captured = check_equal_to_eager(GPT().double(), (tokens, targets))
    ops = [node.op for node in captured.graph.nodes]
    assert captured.input_names == ("tokens", "targets")
    assert ops.count(aten.linear.default) == 9
    assert ops.count(aten.layer_norm.default) == 5
    assert ops.count(aten.embedding.default) == 2
    assert ops.count(aten.scaled_dot_product_attention.default) == 2
    assert ops.count(aten.cross_entropy_loss.default) == 1


def test_nodes_know_their_module_their_class_and_their_line() -> None:
    tokens = torch.zeros(2, 16, dtype=torch.long)
    captured = capture(GPT(), (tokens, tokens))
    linear = [n for n in captured.graph.nodes if n.op == aten.linear.default][1]
    assert (linear.origin.module, linear.origin.module_type) == ("blocks.0.proj", "Linear")
    assert linear.origin.modules == (
        ("", "GPT"),
        ("blocks.0", "Block"),
        ("blocks.0.proj", "Linear"),
    )
    name, _, line = linear.origin.source.partition(":")
    assert name == "test_capture_models.py"
    assert "self.proj" in Path(__file__).read_text().splitlines()[int(line) - 1]
    assert linear.args[1].args == ("parameter", "blocks.0.proj.weight")
    assert linear.args[1].name == "blocks_0_proj_weight"


def test_a_tied_weight_is_one_input_with_two_names() -> None:
    model = GPT()
    tokens = torch.zeros(2, 16, dtype=torch.long)
    captured = capture(model, (tokens, tokens))
    assert captured.aliases["head.weight"] == captured.aliases["wte.weight"] == "wte.weight"
    assert captured.parameters["wte.weight"] is model.wte.weight
    assert "head.weight" not in captured.parameters
    head = next(n for n in captured.graph.nodes if n.origin.module == "head")
    assert head.args[1].args == ("parameter", "wte.weight")


def test_a_cache_in_the_output_is_left_out_and_an_empty_one_leaves_no_operator() -> None:
    make, example = MODELS["llama"]
    model = make()
    assert model.config.use_cache
    captured = capture(model, example(), outputs=("logits",))
    assert output_labels(captured) == ("loss", "output:logits")
    joined = [n for n in captured.graph.nodes if n.op == aten.cat.default]
    assert all(n.origin.module_type in ("LlamaAttention", "LlamaRotaryEmbedding") for n in joined)
    assert captured.constants == {}


def test_a_model_without_memory_is_captured_like_any_other() -> None:
    with torch.device("meta"):
        model = GPT(vocab=50_000, d=16384, layers=1)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    captured = capture(model, (tokens, tokens), device="cuda")
    assert captured.parameters["blocks.0.up.weight"].is_meta
    factory = next(n for n in captured.graph.nodes if n.op == aten.arange.default)
    assert factory.kwargs == {"device": torch.device("cuda")}
    here = capture(GPT(vocab=50_000, d=16, layers=1), (tokens, tokens))
    assert [n.op for n in here.graph.nodes] == [n.op for n in captured.graph.nodes]


def test_capture_leaves_the_model_as_it_was() -> None:
    model = GPT().train()
    model.blocks[0].eval()
    tokens = torch.zeros(2, 16, dtype=torch.long)
    before = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    random = torch.get_rng_state()
    capture(model, (tokens, tokens))
    capture(model, (tokens, tokens), mode="infer")
    assert before == [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)]
    assert model.training
    assert not model.blocks[0].training
    assert torch.equal(random, torch.get_rng_state())


def test_evaluation_has_no_dropout_and_no_gradient() -> None:
    make, example = MODELS["bert"]
    model, batch = make().double().train(), example()
    captured = capture(model, batch, mode="eval", outputs=("logits",))
    assert not any(node.op == aten.dropout.default for node in captured.graph.nodes)
    assert not any(node.requires_grad for node in captured.graph.nodes)
    found = run(captured, **batch)
    expected = model.eval()(**batch)
    torch.testing.assert_close(found["loss"], expected.loss)
    torch.testing.assert_close(found["output:logits"], expected.logits)


@pytest.mark.slow
def test_a_hundred_layers_are_captured_in_seconds() -> None:
    with torch.device("meta"):
        model = GPT(d=64, layers=96)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    start = time.process_time()
    capture(model, (tokens, tokens))
    assert time.process_time() - start < 15

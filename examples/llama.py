"""Train an unmodified Hugging Face Llama, built from a configuration, on four ranks.

python examples/llama.py
meshwright run examples/llama.py --processes 4
meshwright show examples/llama.py:build examples/llama.plan
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import meshwright as mw

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def batch(generator: torch.Generator) -> dict[str, Tensor]:
    """Arithmetic sequences to continue: keywords of the model, `[8, 32]` each."""
    start = torch.randint(0, CONFIG.vocab_size, (8, 1), generator=generator)
    tokens = (start + torch.arange(32)) % CONFIG.vocab_size
    return {"input_ids": tokens, "labels": tokens.clone()}


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and an example batch, for `mw.compile` and for the command line."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG), batch(torch.Generator().manual_seed(0))


def main(steps: int = 50) -> list[float]:
    """Train and return the losses."""
    model, example = build()
    plan = mw.Plan.load(Path(__file__).with_suffix(".plan"))
    run = mw.compile(model, plan, example).launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=3e-3)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(steps):
        loss = run.step(**batch(generator))
        run.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 and os.environ.get("RANK", "0") == "0":
            print(f"step {step:3}  loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    main()

"""Train a small GPT that learns this file by heart, spread over four ranks.

python examples/gpt.py                                     every rank in this process
meshwright run examples/gpt.py --processes 4               one process per rank
meshwright show examples/gpt.py:build examples/gpt.plan    what the plan does to it
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw

VOCABULARY, LENGTH, BATCH = 256, 64, 8


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.ln1(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, dim), nn.Embedding(LENGTH, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of this file, and the bytes that follow: two `[batch, length]` tensors."""
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(0, len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
    windows = text[starts + torch.arange(LENGTH + 1)]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def build() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model and an example batch, for `mw.compile` and for the command line."""
    torch.manual_seed(0)
    return GPT(), batch(torch.Generator().manual_seed(0))


def main(steps: int = 50) -> list[float]:
    """Train and return the losses."""
    model, example = build()
    plan = mw.Plan.load(Path(__file__).with_suffix(".plan"))
    program = mw.compile(model, plan, example)
    run = program.launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-3)
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(steps):
        loss = run.step(*batch(generator))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 and os.environ.get("RANK", "0") == "0":
            print(f"step {step:3}  loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    main()

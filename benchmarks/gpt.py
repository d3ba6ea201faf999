"""The model that every peer trains: a GPT decoder, at two sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """A GPT and its global batch."""

    name: str
    vocab: int
    d: int
    heads: int
    layers: int
    length: int
    batch: int = 8


SIZES = {
    "tiny": Size("tiny", vocab=256, d=64, heads=4, layers=4, length=32),
    "base": Size("base", vocab=8192, d=512, heads=8, layers=8, length=256),
}
ADAMW = {"lr": 3e-4, "fused": True}
"""The optimizer's options, the same for every peer; fused is torch's fastest on the CPU."""


def attention(qkv: Tensor, head_dim: int) -> Tensor:
    """`[b, s, (heads 3 head_dim)]` to `[b, s, (heads head_dim)]`, for any number of heads.

    Heads are major, as in Megatron, so that a contiguous part of the features has whole heads.
    """
    b, s, _ = qkv.shape
    q, k, v = qkv.view(b, s, -1, 3, head_dim).permute(3, 0, 2, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(b, s, -1)


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.head_dim = d // heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(attention(self.qkv(self.ln1(x)), self.head_dim))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.wte = nn.Embedding(size.vocab, size.d)
        self.wpe = nn.Embedding(size.length, size.d)
        self.blocks = nn.ModuleList(Block(size.d, size.heads) for _ in range(size.layers))
        self.ln = nn.LayerNorm(size.d)
        self.head = nn.Linear(size.d, size.vocab, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_model(size: Size) -> GPT:
    """The same weights in every process and for every peer."""
    torch.manual_seed(0)
    return GPT(size)


def make_batch(size: Size, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and targets of one global batch, `[batch, length]` each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size.batch, size.length)
    tokens = torch.randint(0, size.vocab, shape, generator=generator)
    return tokens, torch.randint(0, size.vocab, shape, generator=generator)

"""A Llama of plain modules: RMS norms, rotary positions, grouped heads and a gated feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """A Llama and its batch."""

    vocab: int
    d: int
    heads: int
    kv_heads: int
    layers: int
    hidden: int
    length: int
    batch: int


BILLION = Sizes(32768, 2048, 32, 8, layers=16, hidden=8192, length=2048, batch=4)
SMALL = Sizes(256, 64, 4, 2, layers=2, hidden=128, length=32, batch=2)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        d, self.width = sizes.d, sizes.d // sizes.heads
        kv = sizes.kv_heads * self.width
        self.attention_norm, self.norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v = (nn.Linear(d, n, bias=False) for n in (d, kv, kv))
        self.out = nn.Linear(d, d, bias=False)
        self.gate, self.up = (nn.Linear(d, sizes.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.hidden, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (
            linear(h).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q, k = (rotated(each, cos, sin) for each in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.width = sizes.d // sizes.heads
        self.embed = nn.Embedding(sizes.vocab, sizes.d)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm, self.head = nn.RMSNorm(sizes.d), nn.Linear(sizes.d, sizes.vocab, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        powers = torch.arange(0, self.width, 2, device=tokens.device) / self.width
        angles = torch.outer(places, 10000.0**-powers)
        cos, sin = (each.to(x.dtype) for each in (angles.cos(), angles.sin()))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def on_device(sizes: Sizes, device: str) -> Llama:
    """The same model for every peer, made where it is to be."""
    torch.manual_seed(0)
    with torch.device(device):
        return Llama(sizes)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x[b, h, s, d]`, turned by the angles `[s, d/2]` of its positions."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

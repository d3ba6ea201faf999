"""A decoder as large as M6, and the plan of its cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw

PLAN = """
mesh       dp={gpus}
data       tokens, targets over dp
experts    blocks.*.mlp over dp count={experts} {route} groups={gpus}
zero       1 over dp
precision  fp16
checkpoint blocks.*
"""
"""Every GPU has a part of the batch, which is a group, and of the experts of every layer."""
SHARED = "share blocks.*\n"
"""What makes the plan that of the pseudo stage."""


class FeedForward(nn.Module):
    """What becomes the experts. It has no biases, as the parameters of M6 are counted."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = FeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.ln1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.mlp(self.ln2(x))
        return result


class M6(nn.Module):
    """The text model alone: M6 also takes patches of images, in the same sequence."""

    def __init__(
        self, layers: int, width: int, heads: int, inner: int, vocabulary: int, length: int
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Setting:
    """A model and its cluster: `rows` sequences of `length` tokens for each of `gpus`. How experts
    are routed to, the batch and the vocabulary are ours; the rest is published."""

    name: str
    layers: int
    width: int
    inner: int
    experts: int
    gpus: int
    route: str
    rows: int
    length: int = 512
    heads: int = 16
    vocabulary: int = 21128

    def plan(self, *lines: str) -> mw.Plan:
        """The plan, with further lines."""
        text = PLAN.format(gpus=self.gpus, experts=self.experts, route=self.route)
        return mw.Plan.parse("\n".join((text, *lines)))

    def compiled(self, *lines: str) -> mw.Program:
        """The program; the model is on the meta device, so that nothing is allocated."""
        sizes = self.layers, self.width, self.heads, self.inner, self.vocabulary, self.length
        with torch.device("meta"):
            tokens = torch.zeros(2, self.gpus * self.rows, self.length, dtype=torch.int64)
            model = M6(*sizes)
        return mw.compile(model, self.plan(*lines), tuple(tokens), device="cuda")


SETTINGS = {
    each.name: each
    for each in (
        Setting("100B", 24, 1024, 4096, 512, 128, "route=topk top=2", 8),
        Setting("1T", 24, 1024, 21248, 960, 480, "route=topk top=2", 8),
        Setting("10T", 48, 1024, 9984, 10240, 512, "route=prototype top=80", 1),
    )
}

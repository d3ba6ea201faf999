"""Small models that multiple tests train, and batches for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GPT_TENSOR = """
columns blocks.*.qkv over tp as (3 heads hd)
rows blocks.*.proj over tp
columns blocks.*.up over tp
rows blocks.*.down over tp
"""
GPT_DATA = "data tokens, targets over dp\n"


class Mlp(nn.Module):
    def __init__(self, d: int = 16, f: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).square().mean()


class Indivisible(nn.Module):
    """Sizes that four does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 6, bias=False), nn.Linear(6, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).square().mean()


class Block(nn.Module):
    def __init__(self, d: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        heads = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True, dropout_p=p)
        x = x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), p)
        return x + F.dropout(self.down(F.gelu(self.up(self.ln2(x)))), p)


class Gpt(nn.Module):
    """nanoGPT's shape: fused query, key and value, learned positions, tied head, loss inside."""

    def __init__(
        self, vocab: int = 48, d: int = 24, heads: int = 4, p: float = 0.0, layers: int = 2
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, d), nn.Embedding(8, d)
        self.blocks = nn.ModuleList(Block(d, heads, p) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, vocab, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1), targets.flatten())


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def rows(batch: int = 8, d: int = 16) -> tuple[Tensor]:
    """What `Mlp` takes."""
    return (real(batch, d),)


def tokens(vocab: int = 48, batch: int = 8, length: int = 8) -> tuple[Tensor, Tensor]:
    """What `Gpt` takes; each row has another number of labels that are ignored."""
    targets = torch.randint(0, vocab, (batch, length))
    targets[torch.arange(length) < torch.arange(batch)[:, None] % length] = -100
    return torch.randint(0, vocab, (batch, length)), targets


UNEVEN = """
let short = 6, long = 10
columns up over tp
columns fused over tp as (short | long)
rows down, out over tp
vocab wte, head over tp
"""


class Uneven(nn.Module):
    """Split weights of which the part of a rank does not divide further: 33 features, a fused
    product of two sizes, a vocabulary that is padded as it is used, a scalar and a single entry."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(11, 7), nn.Linear(7, 11)
        self.up, self.down = nn.Linear(7, 66), nn.Linear(66, 7)
        self.fused, self.out = nn.Linear(7, 16), nn.Linear(10, 7)
        self.scale, self.shift = nn.Parameter(torch.rand(())), nn.Parameter(torch.rand(1))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) * self.scale
        x = x + self.down(torch.tanh(self.up(x))) + self.shift
        short, long = self.fused(x).split((6, 10), -1)
        x = x + self.out(torch.sigmoid(long)) + short.square().mean(-1, keepdim=True)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())

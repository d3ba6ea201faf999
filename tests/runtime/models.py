"""Small models that between them have what a run must get right, and the plans they run under."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, D, LENGTH, BATCH = 23, 16, 6, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.ln(x))))


class Tiny(nn.Module):
    """A tied head over a vocabulary that needs padding, a frozen parameter, an unused one."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, D), nn.Embedding(LENGTH, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, VOCAB, bias=False)
        self.head.weight = self.wte.weight
        self.drop, self.spare = nn.Dropout(dropout), nn.Parameter(torch.randn(3))
        self.wpe.weight.requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(D), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        self.steps += 1
        x = self.drop(self.wte(tokens) + self.wpe.weight[: tokens.shape[1]] * self.scratch)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
        return {"loss": loss, "logits": logits}


def make(seed: int = 0, dropout: float = 0.0) -> Tiny:
    """The model with the weights of a seed, in float64."""
    torch.manual_seed(seed)
    return Tiny(dropout).double()


def batch(seed: int = 1, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    """Tokens and targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, LENGTH)
    tokens = torch.randint(0, VOCAB, shape, generator=generator)
    return tokens, torch.randint(0, VOCAB, shape, generator=generator)


_MLP = "columns blocks.*.up over tp\nrows blocks.*.down over tp\n"
_DATA = "data tokens, targets over dp\n"
PLANS = {
    "data": "mesh dp=2\n" + _DATA,
    "tensor": "mesh tp=2\n" + _MLP + "vocab wte, head over tp\n",
    "both": "mesh dp=2, tp=2\n" + _DATA + _MLP + "vocab wte, head over tp\n",
    "blocks": "mesh row=2, col=2\nsumma ** over (row, col)\n",
    "sequence": "mesh tp=2\n" + _MLP + "sequence blocks.* over tp\n",
    "zero": "mesh dp=2, tp=2\n" + _DATA + _MLP + "zero 3 over dp\naccumulate 2\n"
    "offload parameters blocks.*.up\noffload optimizer\n",
}

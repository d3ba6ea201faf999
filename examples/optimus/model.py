"""The transformer of the paper, and the plans that are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from examples.gpt import Block

LAYERS, LENGTH, VOCABULARY = 24, 512, 51200

FLAT = """
mesh    tp={ranks}
let     heads = {heads}
columns blocks.*.qkv  over tp as (3 heads hd)
rows    blocks.*.proj over tp
columns blocks.*.up   over tp
rows    blocks.*.down over tp
vocab   wte, head     over tp
"""
GRID = """
mesh  row={side}, col={side}
let   heads = {heads}
summa **           over (row, col)
summa blocks.*.qkv over (row, col) as (3 heads hd)
"""
PLANS = {"1-D": FLAT, "1-D, sequence": FLAT + "sequence blocks.* over tp\n", "2-D": GRID}
CHECKPOINTS = {"1-D": "checkpoint blocks.* split=tp\n"}
"""By plan: what is computed again. In one dimension ranks have the same activations, of which each
keeps a part, as Megatron's distributed checkpoints do: whole, they would fill the memory."""
CHECKPOINT = "checkpoint blocks.*\n"


class GPT(nn.Module):
    """Embeddings, blocks, and a head that is the table."""

    def __init__(self, width: int, heads: int, layers: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
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
    """A number of ranks, and the model that they train."""

    ranks: int
    width: int
    heads: int
    layers: int = LAYERS
    vocabulary: int = VOCABULARY
    length: int = LENGTH

    @property
    def side(self) -> int:
        """The ranks along each axis of the grid."""
        return math.isqrt(self.ranks)

    def compiled(
        self, form: str, batch: int, *, checkpoint: bool = True, mode: str = "train"
    ) -> mw.Program:
        """The program under one of `PLANS`; the model is on the meta device, so that nothing is
        allocated."""
        text = PLANS[form].format(ranks=self.ranks, side=self.side, heads=self.heads)
        if checkpoint:
            text += CHECKPOINTS.get(form, CHECKPOINT)
        with torch.device("meta"):
            sizes = self.width, self.heads, self.layers, self.vocabulary, self.length
            tokens = torch.zeros(2, batch, self.length, dtype=torch.int64)
            model = GPT(*sizes)
        plan = mw.Plan.parse(text)
        return mw.compile(model, plan, tuple(tokens), device="cuda", mode=mode)

"""Models of which each half is a stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Deep(nn.Module):
    """Eight layers, all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x.square().mean()


class Results(Deep):
    """The same with results of several kinds."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        for layer in self.layers:
            x = F.gelu(layer(x))
        return {"loss": x.square().mean(), "y": x, "positive": x > 0, "most": x.amax()}


class Looked(Deep):
    """The same, and at the end a row of a table for each row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 16)
        self.double()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = F.gelu(layer(x))
        return (x * self.table(ids)).square().mean()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, turned: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x * turned))))


class Tied(nn.Module):
    """What crosses cuts in language models: a weight of the first stage and the last, a table for
    every stage, an embedding that the last block takes, and labels that are ignored."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.wte.weight
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.double()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = first = self.wte(tokens)
        turned = torch.arange(tokens.shape[1])[:, None].mul(0.3).cos()
        for block in self.blocks[:-1]:
            x = block(x, turned)
        x = self.blocks[-1](x + first, turned)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


TENSOR = """
columns blocks.*.up over tp
rows blocks.*.down over tp
vocab wte, head over tp
sequence blocks.* over tp
"""
BESIDE = {
    "alone": ("", ""),
    "data": ("dp=2, ", ""),
    "tensor": ("tp=2, ", TENSOR),
    "zero 2": ("dp=2, ", "zero 2 over dp\n"),
    "zero 3": ("dp=2, ", "zero 3 over dp\n"),
    "checkpoint": ("", "checkpoint blocks.* keep=[norm]\n"),
}
"""What a pipeline is combined with: the axes of the mesh before its own, and statements."""
SCHEDULES = [
    *((name, 1) for name in ("gpipe", "1f1b", "zb", "zbh2")),
    *((name, 2) for name in ("gpipe", "interleaved", "zbv", "dualpipev")),
    ("dualpipe", 1),
]
"""Every schedule, and how many stages a rank has."""
Case = tuple[str, int, int, int, str]
"""What `plan_of` takes."""


def plan_of(schedule: str, virtual: int, stages: int, microbatches: int, beside: str) -> str:
    """One for `Tied` with as many blocks as there are stages."""
    axes, statements = BESIDE[beside]
    modules = ", ".join(f"blocks.{i}" for i in range(1, stages))
    over = " over dp" if "dp" in axes else ""
    return (
        f"mesh {axes}pp={stages // virtual}\n"
        f"data tokens, targets{over}\n"
        f"stages at {modules} over pp virtual={virtual} "
        f"schedule={schedule} microbatches={microbatches}\n{statements}"
    )


PLAN = "mesh pp=2\ndata x, ids\nstages at layers.4 over pp microbatches=4\n"
"""One for `Looked`."""


def batch() -> tuple[Tensor, Tensor]:
    """Eight rows of 16, and eight numbers below 5."""
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, generator=seed, dtype=torch.float64)
    return x, torch.randint(0, 5, (8,), generator=seed)

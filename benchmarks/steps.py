"""Training steps on one device, as peers take them: torch's own, and those of compiled programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import meshwright as mw
from benchmarks.gpt import GPT, Size

Batch = tuple[Tensor, Tensor]
DATA = "data tokens, targets over dp\n"
ONE = "mesh dp=1\n" + DATA


def gpt(size: Size, device: str, dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT with a tied head, the same for every peer."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(size)
    nn.init.normal_(model.wte.weight, std=0.02)
    model.head.weight = model.wte.weight
    return model.to(dtype)


def batch(vocab: int, shape: tuple[int, int], device: str, seed: int = 0) -> Batch:
    """Tokens and targets."""
    drawn = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(0, vocab, shape, generator=drawn) for _ in range(2))
    return tokens.to(device), targets.to(device)


class Eager:
    """Torch's own steps: forward, backward and update, under autocast if the type is half."""

    def __init__(self, model: nn.Module, device: str, half: bool, *, compiled: bool = False):
        self.model, self.autocast = model, nullcontext
        if half:
            self.autocast = partial(torch.autocast, device, dtype=torch.bfloat16)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.call = torch.compile(model) if compiled else model

    def __call__(self, given: Batch) -> Tensor:
        with self.autocast():
            loss = self.call(*given)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Ours:
    """The same steps of a compiled program; the model that was compiled is let go of."""

    def __init__(self, model: nn.Module, plan: str, given: Batch, device: str, **options: Any):
        program = mw.compile(model, mw.Plan.parse(plan), given, device=device)
        self.run = program.launch(check_finite=False, **options)
        self.optimizer = self.run.optimizer(torch.optim.AdamW, lr=1e-4, fused=True)

    def __call__(self, given: Batch) -> Tensor:
        loss = self.run.step(*given)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def on_one_rank(
    make: Callable[[], nn.Module], given: Batch, device: str, half: bool
) -> Mapping[str, Callable[[], Eager | Ours]]:
    """The ways to train a model on one rank; what others are compared with comes first."""
    plan = ONE + "precision bf16\n" * half
    return {
        "compiled eager": lambda: Eager(make(), device, half, compiled=True),
        "eager": lambda: Eager(make(), device, half),
        "meshwright inductor": lambda: Ours(make(), plan, given, device, backend="inductor"),
        "meshwright": lambda: Ours(make(), plan, given, device),
    }

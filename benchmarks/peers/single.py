"""One process in eager mode, with whose losses every peer's are compared."""

from __future__ import annotations

import torch

from benchmarks.gpt import ADAMW, Size, make_batch, make_model


def losses(size: Size, steps: int) -> list[float]:
    """The losses of the first steps, each on a batch of its own."""
    model = make_model(size)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    found = []
    for step in range(steps):
        loss = model(*make_batch(size, seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found

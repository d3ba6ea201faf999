"""What torch has for the memory of activations: checkpoints, and hooks that move saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from benchmarks.gpt import ADAMW, GPT, Size, make_model
from benchmarks.peers import Peer

aten = torch.ops.aten
KEPT = [
    aten.addmm.default,
    aten.mm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What `selective` saves: the results of matrix products and of attention."""
Blocks = Callable[[nn.ModuleList, Tensor], Tensor]


def torch_saving(size: Size, how: str) -> Peer:
    """The model in one process: `saved` is torch as it is, `blocks` a checkpoint of each block,
    `segments` of as many runs of blocks as the root of their number, `selective` of each block with
    `KEPT`, and `offload` moves what blocks save to host memory, as `save_on_cpu` does on a GPU.
    """
    model = make_model(size)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    blocks = BLOCKS[how]

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = _forward(model, blocks, tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Peer("torch", how, step)


def _forward(model: GPT, blocks: Blocks, tokens: Tensor, targets: Tensor) -> Tensor:
    """As the model's own, but for how its blocks are run."""
    x = model.wte(tokens) + model.wpe(torch.arange(tokens.shape[1]))
    logits = model.head(model.ln(blocks(model.blocks, x)))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _saved(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _checkpointed(blocks: nn.ModuleList, x: Tensor, **options: Any) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False, **options)
    return x


def _selective(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return _checkpointed(blocks, x, context_fn=partial(create_selective_checkpoint_contexts, KEPT))


def _segments(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return checkpoint_sequential(blocks, segments_of(len(blocks)), x, use_reentrant=False)


def segments_of(layers: int) -> int:
    """The whole number nearest to the root."""
    return round(layers**0.5)


def _offloaded(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    with saved_tensors_hooks(_to_host, Tensor.clone):
        return _saved(blocks, x)


def _to_host(tensor: Tensor) -> Tensor:
    # `save_on_cpu` copies nothing where the device is the CPU. NumPy's memory is not the
    # allocator's of torch, so that it does not count as the device's.
    away = torch.from_numpy(np.empty(tensor.shape, tensor.detach().numpy().dtype))
    return away.copy_(tensor)


BLOCKS: dict[str, Blocks] = {
    "saved": _saved,
    "blocks": _checkpointed,
    "segments": _segments,
    "selective": _selective,
    "offload": _offloaded,
}

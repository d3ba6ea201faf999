"""Data parallelism: torch's DistributedDataParallel, and one flat all-reduce by hand."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpt import ADAMW, Size, make_model
from benchmarks.peers import Peer, rows


def ddp(size: Size, mesh: DeviceMesh) -> Peer:
    """Torch's DDP: gradients are views of buckets, reduced while the backward runs."""
    model = DistributedDataParallel(
        make_model(size), gradient_as_bucket_view=True, static_graph=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model(rows(tokens, mesh), rows(targets, mesh))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Peer("ddp", "", step, loss_is_local=True)


def flat(size: Size, mesh: DeviceMesh) -> Peer:
    """One flat buffer, of which every gradient is a view, reduced once after the backward."""
    model = make_model(size)
    buffer = torch.zeros(sum(p.numel() for p in model.parameters()))
    pieces = buffer.split([p.numel() for p in model.parameters()])
    for parameter, piece in zip(model.parameters(), pieces, strict=True):
        parameter.grad = piece.view_as(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model(rows(tokens, mesh), rows(targets, mesh))
        (loss / mesh.size()).backward()
        dist.all_reduce(buffer)
        optimizer.step()
        buffer.zero_()
        return loss.detach()

    return Peer("flat", "", step, loss_is_local=True)

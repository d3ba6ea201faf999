"""Data-parallel training with sharded state: torch's FSDP2, and DDP with a sharded optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpt import ADAMW, Size, make_model
from benchmarks.peers import Peer, rows


def fsdp2(
    size: Size,
    mesh: DeviceMesh,
    reshard: bool,
    microbatches: int = 1,
    bf16: bool = False,
    offload: bool = False,
) -> Peer:
    """FSDP2 as its documentation has it: each block, then the root.

    With `reshard` whole weights are freed after the forward and after the backward, without it when
    the last microbatch has used them. Gradients of microbatches are added up whole, and reduced in
    the last. With `bf16` it computes in bfloat16 and reduces in float32, and with `offload` its
    shards stay in host memory.
    """
    model = make_model(size)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    kept = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    for module in (*model.blocks, model):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard,
            mp_policy=policy,
            offload_policy=kept,
        )
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def prepare(last: bool) -> None:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or reshard)

    name = "fsdp2 offload" if offload else "fsdp2 resharded" if reshard else "fsdp2 kept"
    step = _step(model, optimizer, mesh, microbatches, prepare)
    if not offload:
        return Peer(name, "", step, loss_is_local=True)

    def elsewhere() -> Iterable[Tensor]:
        for parameter in model.parameters():
            # Its gradient, as large, will be there at the peak.
            for tensor in (parameter, parameter, *optimizer.state[parameter].values()):
                yield tensor.to_local() if isinstance(tensor, DTensor) else tensor

    return Peer(name, "", step, loss_is_local=True, elsewhere=elsewhere)


def ddp_zero(size: Size, mesh: DeviceMesh, microbatches: int = 1) -> Peer:
    """DDP, of whose parameters each rank steps a share and sends it to the others."""
    model = DistributedDataParallel(make_model(size), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, **ADAMW
    )

    def prepare(last: bool) -> None:
        model.require_backward_grad_sync = last  # as `no_sync` does

    step = _step(model, optimizer, mesh, microbatches, prepare)
    return Peer("ddp zero", "", step, loss_is_local=True)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: DeviceMesh,
    microbatches: int,
    prepare: Callable[[bool], None],
) -> Callable[[Tensor, Tensor], Tensor]:
    """A step in microbatches; `prepare` is told before each whether it is the last."""

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros(())
        parts = [rows(tensor, mesh).chunk(microbatches) for tensor in (tokens, targets)]
        for number, part in enumerate(zip(*parts, strict=True), 1):
            prepare(number == microbatches)
            loss = model(*part) / microbatches
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step

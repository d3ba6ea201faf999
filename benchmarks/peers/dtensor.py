"""Tensor parallelism with torch's DTensor: `parallelize_module`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.gpt import ADAMW, Size, make_model
from benchmarks.peers import Peer, average, rows


def dtensor(size: Size, mesh: DeviceMesh, feature: str) -> Peer:
    """The plain model under `parallelize_module`.

    Over dp, gradients are averaged in one flat buffer: DDP does not take DTensors, and FSDP2 costs
    more at these sizes.
    """
    model = make_model(size)
    parallelize_module(model, mesh["tp"], styles(feature))
    reduces = "dp" in (mesh.mesh_dim_names or ())
    optimizer = torch.optim.AdamW(parameter_groups(model), **ADAMW)

    def context() -> AbstractContextManager[None]:
        return nullcontext() if feature == "gathered" else loss_parallel()

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        with context():
            loss = model(rows(tokens, mesh), rows(targets, mesh))
            loss.backward()
        if reduces:
            average([local(p.grad) for p in model.parameters()], mesh["dp"])
        optimizer.step()
        optimizer.zero_grad()
        return local(loss.detach())

    return Peer("dtensor", feature, step, loss_is_local=True)


def local(tensor: Tensor) -> Tensor:
    """This rank's tensor, with partial sums as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def styles(feature: str) -> dict[str, ParallelStyle]:
    """Each module's style.

    Between modules activations are local tensors, so that only the norms and the loss pay for
    DTensor's dispatch.
    """
    between = Shard(1) if feature == "sequence" else Replicate()
    found: dict[str, ParallelStyle] = {
        "wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "blocks.*.qkv": ColwiseParallel(input_layouts=between),
        "blocks.*.proj": RowwiseParallel(output_layouts=between),
        "blocks.*.up": ColwiseParallel(input_layouts=between),
        "blocks.*.down": RowwiseParallel(output_layouts=between),
    }
    if feature == "gathered":
        found["head"] = ColwiseParallel(output_layouts=Replicate())
    else:
        found["head"] = ColwiseParallel(
            input_layouts=between, output_layouts=Shard(-1), use_local_output=False
        )
    if feature == "sequence":
        norm = SequenceParallel()
        found |= {"blocks.*.ln1": norm, "blocks.*.ln2": norm, "ln": norm}
        found["wpe"] = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(0)
        )
    return found


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """DTensors and plain tensors in separate groups: one fused update cannot take both."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(isinstance(parameter.data, DTensor), []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]

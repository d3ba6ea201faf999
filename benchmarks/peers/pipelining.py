"""Pipelines of `torch.distributed.pipelining`, on stages made of the model's own modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.nn import functional as F

from benchmarks.gpt import ADAMW, GPT, Size, make_model
from benchmarks.peers import Peer
from benchmarks.stages import MICROBATCHES, Cut

SCHEDULES: dict[str, type[PipelineScheduleSingle | PipelineScheduleMulti]] = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zb": pipelining.ScheduleInterleavedZeroBubble,
    "zbv": pipelining.ScheduleZBVZeroBubble,
}


class Part(nn.Module):
    """Some of the blocks, with the embeddings before the first and the head behind the last."""

    def __init__(self, model: GPT, blocks: range, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.blocks = model.blocks[blocks.start : blocks.stop]
        if first:
            self.wte, self.wpe = model.wte, model.wpe
        if last:
            self.ln, self.head = model.ln, model.head

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x)) if self.last else x


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_pipeline(size: Size, mesh: DeviceMesh, cut: Cut) -> Peer:
    """The stages of this rank under torch's schedule of that name, and one optimizer for them."""
    model, count = make_model(size), len(cut.blocks)
    own = [k for k, rank in enumerate(cut.ranks) if rank == mesh.get_local_rank()]
    parts = [Part(model, cut.blocks[k], k == 0, k == count - 1) for k in own]
    device, group = torch.device("cpu"), mesh.get_group()
    stages = [
        PipelineStage(part, k, count, device, group=group)
        for k, part in zip(own, parts, strict=True)
    ]
    kind = SCHEDULES[cut.schedule]
    given: Sequence[PipelineStage] | PipelineStage = stages
    if issubclass(kind, PipelineScheduleSingle):
        (given,) = stages
    schedule = kind(given, MICROBATCHES, loss_fn=_loss)  # type: ignore[arg-type]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, **ADAMW)
    first, last = 0 in own, count - 1 in own

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []
        schedule.step(
            *((tokens,) if first else ()),
            target=targets if last else None,
            losses=losses if last else None,
            return_outputs=False,
        )
        optimizer.step()
        optimizer.zero_grad()
        # Only the rank of the last stage knows it.
        return torch.stack(losses).mean().detach() * mesh.size() if last else torch.zeros(())

    return Peer("torch", cut.schedule, step, loss_is_local=True)

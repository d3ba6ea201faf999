"""Hand-written tensor parallelism in Megatron's style, on raw collectives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpt import ADAMW, GPT, Block, Size, make_model
from benchmarks.peers import Peer, reduce, rows
from benchmarks.peers.collectives import (
    ColumnLinear,
    GatherFeatures,
    Reduce,
    ReduceScatter,
    VocabParallelCrossEntropy,
)


class ParallelBlock(nn.Module):
    """A block that holds its rank's heads and hidden features; activations are `[s, b, d]`."""

    def __init__(self, block: Block, group: dist.ProcessGroup, sequence: bool) -> None:
        super().__init__()
        self.group, self.sequence, self.head_dim = group, sequence, block.head_dim
        self.ln1, self.ln2 = block.ln1, block.ln2
        self.qkv, self.up = columns(block.qkv, group), columns(block.up, group)
        self.proj, self.down = split_rows(block.proj, group), split_rows(block.down, group)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.row(self.proj, self.attention(self.column(self.qkv, self.ln1(x))))
        return x + self.row(self.down, F.gelu(self.column(self.up, self.ln2(x))))

    def attention(self, qkv: Tensor) -> Tensor:
        s, b, _ = qkv.shape
        q, k, v = qkv.view(s, b, -1, 3, self.head_dim).permute(3, 1, 2, 0, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.permute(2, 0, 1, 3).reshape(s, b, -1)

    def column(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return ColumnLinear.apply(x, linear.weight, linear.bias, self.group, self.sequence)

    def row(self, linear: nn.Linear, x: Tensor) -> Tensor:
        collective = ReduceScatter if self.sequence else Reduce
        return collective.apply(F.linear(x, linear.weight), self.group) + linear.bias


class ParallelGPT(nn.Module):
    def __init__(self, model: GPT, group: dist.ProcessGroup, feature: str) -> None:
        super().__init__()
        self.group, self.feature, self.sequence = group, feature, feature == "sequence"
        self.wte = nn.Embedding.from_pretrained(part(model.wte.weight, 0, group), freeze=False)
        self.wpe, self.ln = model.wpe, model.ln
        self.blocks = nn.ModuleList(
            ParallelBlock(block, group, self.sequence) for block in model.blocks
        )
        self.head = columns(model.head, group)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens.t())
        for block in self.blocks:
            x = block(x)
        logits = ColumnLinear.apply(
            self.ln(x), self.head.weight, None, self.group, self.sequence
        ).flatten(0, 1)
        targets = targets.t().flatten()
        if self.feature == "gathered":
            return F.cross_entropy(GatherFeatures.apply(logits, self.group), targets)
        return VocabParallelCrossEntropy.apply(logits, targets, self.group)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens `[s, b]` to activations, of this rank's part of the sequence if that is split."""
        index = tokens - self.group.rank() * self.wte.num_embeddings
        absent = (index < 0) | (index >= self.wte.num_embeddings)
        x = self.wte(index.masked_fill(absent, 0)).masked_fill(absent.unsqueeze(-1), 0)
        positions = torch.arange(tokens.shape[0])
        if self.sequence:
            positions = positions.chunk(self.group.size())[self.group.rank()]
        collective = ReduceScatter if self.sequence else Reduce
        return collective.apply(x, self.group) + self.wpe(positions).unsqueeze(1)

    def partial(self) -> list[nn.Parameter]:
        """The unsplit parameters whose gradients are partial sums under a split sequence."""
        if not self.sequence:
            return []
        found = [self.wpe.weight, *self.ln.parameters()]
        for block in self.blocks:
            found += [*block.ln1.parameters(), *block.ln2.parameters()]
            found += [block.proj.bias, block.down.bias]
        return found


def part(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part, in memory of its own."""
    return tensor.detach().chunk(group.size(), dim)[group.rank()].clone()


def columns(linear: nn.Linear, group: dist.ProcessGroup) -> nn.Linear:
    linear.weight = nn.Parameter(part(linear.weight, 0, group))
    if linear.bias is not None:
        linear.bias = nn.Parameter(part(linear.bias, 0, group))
    return linear


def split_rows(linear: nn.Linear, group: dist.ProcessGroup) -> nn.Linear:
    linear.weight = nn.Parameter(part(linear.weight, 1, group))
    return linear


def megatron(size: Size, mesh: DeviceMesh, feature: str) -> Peer:
    """The hand-written model; over dp it is wrapped in DDP.

    Gradients that are partial over tp share one all-reduce.
    """
    group = mesh.get_group("tp")
    model = ParallelGPT(make_model(size), group, feature)
    trained: nn.Module = model
    if "dp" in (mesh.mesh_dim_names or ()):
        trained = DistributedDataParallel(
            model,
            process_group=mesh.get_group("dp"),
            gradient_as_bucket_view=True,
        )
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    partial = model.partial()

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = trained(rows(tokens, mesh), rows(targets, mesh))
        loss.backward()
        if partial:
            reduce([parameter.grad for parameter in partial], group)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Peer("hand-written", feature, step, loss_is_local=True)

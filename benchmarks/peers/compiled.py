"""Meshwright, through its public names only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import meshwright as mw
from benchmarks.gpt import ADAMW, Size, make_batch, make_model
from benchmarks.peers import Peer
from benchmarks.stages import MICROBATCHES, VIRTUAL, Cut

TENSOR = """
let     heads = {heads}
columns blocks.*.qkv  over tp as (heads 3 hd)
rows    blocks.*.proj over tp
columns blocks.*.up   over tp
rows    blocks.*.down over tp
"""
HEAD = {
    "gathered": "vocab wte over tp\ncolumns head over tp\nshard head -> [{b}, s, v]\n",
    "vocab": "vocab wte, head over tp\n",
    "sequence": "vocab wte, head over tp\nsequence blocks.* over tp\n",
}


def plan_text(size: Size, mesh: DeviceMesh, feature: str, microbatches: int = 1) -> str:
    """The plan for a mesh of dp, tp or both; `feature` is a level of tensor parallelism where there
    is tp, and else may be a level of `zero`.
    """
    names = mesh.mesh_dim_names or ()
    sizes = ", ".join(f"{name}={mesh[name].size()}" for name in names)
    text = f"mesh {sizes}\n"
    if "dp" in names:
        text += "data tokens, targets over dp\n"
    if "tp" in names:
        batch = "b@dp" if "dp" in names else "b"
        text += (TENSOR + HEAD[feature]).format(heads=size.heads, b=batch)
    elif feature.startswith("zero"):
        text += f"{feature} over dp\n"
    if microbatches > 1:
        text += f"accumulate {microbatches}\n"
    return text


def meshwright(
    size: Size,
    mesh: DeviceMesh,
    feature: str = "",
    check_inputs: bool | int = True,
    microbatches: int = 1,
    bf16: bool = False,
) -> Peer:
    text = plan_text(size, mesh, feature, microbatches)
    text += "precision bf16\n" if bf16 else ""
    return _peer(size, text, feature, check_inputs)


def pipeline(size: Size, mesh: DeviceMesh, cut: Cut) -> Peer:
    stages = f"stages at {', '.join(cut.names)} over pp microbatches={MICROBATCHES}"
    text = f"mesh pp={mesh.size()}\ndata tokens, targets\n{stages} schedule={cut.schedule}"
    return _peer(size, f"{text} virtual={VIRTUAL[cut.schedule]}\n", cut.schedule)


def _peer(size: Size, plan: str, feature: str, check_inputs: bool | int = True) -> Peer:
    program = mw.compile(make_model(size), mw.Plan.parse(plan), example=make_batch(size))
    run = program.launch(check_inputs=check_inputs)
    optimizer = run.optimizer(torch.optim.AdamW, **ADAMW)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = run.step(tokens, targets)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Peer("meshwright", feature, step)

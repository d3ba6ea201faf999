"""Meshwright, through its public names only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import meshwright as mw
from benchmarks.gpt import ADAMW, Size, make_batch, make_model
from benchmarks.peers import Peer
from benchmarks.peers.late import late
from benchmarks.peers.saving import segments_of
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

TENSOR_FORMS = {
    "columns": "mesh tp=4\n" + TENSOR + HEAD["vocab"],
    "sequence": "mesh tp=4\n" + TENSOR + HEAD["sequence"],
    "summa": """
mesh  row=2, col=2
let   heads = {heads}
summa ** over (row, col)
summa blocks.*.qkv over (row, col) as (heads 3 hd)
""",
}
"""Plans of four ranks that split every product, by what `in_form` calls them."""

SAVING = {
    "saved": "",
    "blocks": "checkpoint blocks.*",
    "segments": "checkpoint blocks.* segments={segments}",
    "selective": "checkpoint blocks.* keep=[matmul, attention]",
    "offload": "offload activations blocks.* prefetch=0",
    "prefetch": "offload activations blocks.*",
    "offloaded": "zero 3 over dp\noffload parameters\noffload optimizer",
}
"""How a step saves memory: the statements, by what `saving` calls them."""


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
    return _peer(_compiled(size, text), "meshwright", feature, check_inputs)


def pipeline(size: Size, mesh: DeviceMesh, cut: Cut, system: str = "meshwright") -> Peer:
    """The system `late` sends gradients after the whole backward."""
    stages = f"stages at {', '.join(cut.names)} over pp microbatches={MICROBATCHES}"
    text = f"mesh pp={mesh.size()}\ndata tokens, targets\n{stages} schedule={cut.schedule}"
    program = _compiled(size, f"{text} virtual={VIRTUAL[cut.schedule]}\n")
    return _peer(late(program) if system == "late" else program, system, cut.schedule)


def saving(size: Size, mesh: DeviceMesh, how: str, budget: int | None = None) -> Peer:
    """`how` is one of `SAVING`; `fits ...` computes again what a peak of `budget` bytes demands."""
    statements = SAVING.get(how, f"checkpoint budget={(budget or 0) // 1024}KiB")
    text = plan_text(size, mesh, "") + statements.format(segments=segments_of(size.layers))
    return _peer(_compiled(size, text), "meshwright", how)


def in_form(size: Size, form: str) -> Peer:
    """`form` is one of `TENSOR_FORMS`."""
    return _peer(program_in(size, form), "meshwright", form)


def program_in(size: Size, form: str) -> mw.Program:
    return _compiled(size, TENSOR_FORMS[form].format(heads=size.heads))


def _compiled(size: Size, plan: str) -> mw.Program:
    return mw.compile(make_model(size), mw.Plan.parse(plan), example=make_batch(size))


def _peer(program: mw.Program, system: str, feature: str, check_inputs: bool | int = True) -> Peer:
    run = program.launch(check_inputs=check_inputs)
    optimizer = run.optimizer(torch.optim.AdamW, **ADAMW)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = run.step(tokens, targets)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Peer(system, feature, step)

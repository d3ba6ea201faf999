"""What a GPU is given, on a machine without one: its graphs, and a step that waits for nothing.

On a machine with a GPU these hold as well.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn import functional as F

import meshwright
from meshwright.compiler.public import Program
from meshwright.runtime import inductor
from tests.compiler.codegen.test_segments import emptied
from tests.fake_cuda import fake_cuda
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens

TENSOR = "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR
ALL_SPLIT = TENSOR + "vocab wte, head over tp\nsequence blocks.* over tp\n"


class Mixed(nn.Module):
    """Operators of which torch has others on a GPU: recurrences, batch norms, convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.lstm, self.rms = nn.LSTM(16, 12, batch_first=True), nn.RMSNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.norm(self.conv(x))), 0.1).transpose(1, 2)
        x = self.rms(self.lstm(x)[0])
        q = x.unflatten(-1, (2, 6)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).square().mean()


def compiled(model: nn.Module, example: tuple[Tensor, ...], plan: str, device: str) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), example, device=device)


@pytest.mark.parametrize("kind", ["gpt", "mixed"])
def test_graphs_for_a_gpu_are_those_for_a_cpu_whichever_machine_compiles(kind: str) -> None:
    """Capture and types take every tensor to be on a CPU, so a machine with a GPU gives the same
    graphs as one without. Of one rank: among more, where things are moved depends on how fast
    devices and links are."""
    if kind == "gpt":
        model, plan, example = (
            Gpt(p=0.1),
            ALL_SPLIT.replace("=2", "=1") + "precision bf16\n",
            tokens(),
        )
    else:
        model, plan, example = Mixed(), "mesh dp=1\ndata x over dp\n", (torch.randn(4, 8, 10),)
    texts = [
        {
            name: str(graph)
            for name, graph in compiled(model, example, plan, device).graphs().items()
        }
        for device in ("cuda", "cpu")
    ]
    assert texts[0] == texts[1]


PLANS = {
    "tensor, vocab and sequence in bfloat16": ALL_SPLIT + "precision bf16\n",
    "zero, microbatches and checkpoints": "mesh dp=4\n" + GPT_DATA
    + "zero 3 over dp\naccumulate 2\ncheckpoint blocks.0\n",
    "a pipeline": "mesh pp=2, dp=2\n" + GPT_DATA
    + "stages at blocks.1 over pp schedule=zb microbatches=4\n",
    "blocks": "mesh r=2, c=2\nsumma blocks.* over (r, c)\n",
    "a ring": "mesh cp=2\ncontext blocks.* over cp\n",
    "experts": "mesh ep=2\ndata tokens, targets over ep\nexperts blocks.*.up over ep count=4\n",
    "offloading": "mesh dp=2\n" + GPT_DATA
    + "offload activations blocks.*\n",
}  # fmt: skip
MOVES = {"offloading"}
FAST = {"tensor, vocab and sequence in bfloat16", "offloading"}


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PLANS]
)
def test_a_step_on_a_gpu_waits_for_nothing_and_moves_the_inputs_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compiled(Gpt(p=0.1), tokens(), PLANS[name], "cuda")
    with fake_cuda(monkeypatch) as machine:
        run = program.launch(check_finite=False)
        optimizer = run.optimizer(torch.optim.AdamW, lr=1e-3)
        assert optimizer.defaults["fused"]
        for _ in range(2):
            before = machine.operators, len(machine.copies), machine.waits
            loss = run.step(*tokens())
            assert loss.is_cuda and machine.operators > before[0] and machine.waits == before[2]
            copies = machine.copies[before[1] :]
            optimizer.step()
            optimizer.zero_grad()
    if name not in MOVES:
        assert copies == ["to the device"] * len(copies)
        assert len(copies) <= 2 * program.mesh.num_ranks


def test_the_check_of_an_update_reads_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a wait would be seen."""
    program = compiled(Gpt(), tokens(), "mesh dp=2\n" + GPT_DATA, "cuda")
    with fake_cuda(monkeypatch):
        run = program.launch()
        optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
        run.step(*tokens())
        with pytest.raises(DataDependentOutputException):
            optimizer.step()


def test_segments_on_a_gpu_wait_for_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run call by call: Inductor has nothing to compile for here."""
    monkeypatch.setattr(inductor, "_fused", emptied)
    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(inductor, "check_compiler", lambda device: None)
    program = compiled(Gpt(p=0.1), tokens(), PLANS["offloading"], "cuda")
    with fake_cuda(monkeypatch) as machine:
        run = program.launch(check_finite=False, backend="inductor")
        run.step(*tokens())
        before = machine.waits
        assert run.step(*tokens()).is_cuda
        assert machine.waits == before
    assert inductor._compiled

"""Train a little on the virtual mesh with the installed wheel, away from the sources."""

import sys
from pathlib import Path

import torch
from torch import nn

import meshwright as mw

assert not Path(mw.__file__).resolve().is_relative_to(sys.argv[1]), mw.__file__


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.down(torch.relu(self.up(x))), y)


PLAN = """
mesh    dp=2, tp=2
data    x, y over dp
columns up   over tp
rows    down over tp
"""

torch.manual_seed(0)
model, batch = Model(), (torch.randn(8, 16), torch.randn(8, 16))
expected = model(*batch)
run = mw.compile(model, mw.Plan.parse(PLAN), batch).launch()
optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
losses = []
for _ in range(5):
    losses.append(run.step(*batch).item())
    optimizer.step()
    optimizer.zero_grad()
assert abs(losses[0] - expected.item()) < 1e-6, (losses[0], expected.item())
assert losses[-1] < losses[0], losses
print(f"installed in {Path(mw.__file__).parent}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")

"""Run by each process of a test: start from a folder of weights, and say what was read of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.runtime.state.start import checksum

WIDE = 1024


class Wide(nn.Module):
    """Two weights of 8 MiB, or of a multiple of that, and a small one."""

    def __init__(self, width: int = WIDE) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).sum()


def resident(file: Path) -> float:
    """The fraction of a file's bytes that this process has in memory of its own."""
    kibibytes, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = words[-1] == str(file)
        elif inside and words[0] == "Rss:":
            kibibytes += int(words[1])
    return 1024 * kibibytes / file.stat().st_size


def main(folder: str, *own: str) -> None:
    with torch.device("meta"):
        model = Wide()
    plan = mw.Plan.parse("mesh tp=2\ncolumns up over tp\nrows down over tp")
    program = mw.compile(model, plan, (torch.ones(2, WIDE),))
    for name in ("one", own[int(os.environ["RANK"])]):
        source = Path(folder, name)
        with program.launch(state_dict=mw.read_state_dict(source)) as run:
            fraction = resident(source.resolve() / "model.safetensors")
            print(sum(int(checksum(value)) for value in run.state_dict().values()), fraction < 0.7)

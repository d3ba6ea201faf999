"""Train a GPT on the bytes of a file, and go on where it stopped: a script to copy.

python examples/train_gpt.py                               every rank in this process
meshwright run examples/train_gpt.py --processes 4         one process per rank, as with torchrun
python examples/train_gpt.py --data my.txt --folder run    your text, and checkpoints in `run`
python examples/train_gpt.py --plan examples/train_gpt_pipeline.plan    the same in a pipeline
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import meshwright as mw

TEXT = pydoc_data.topics.__file__  # Python's reference manual, which comes with it: 700 KB
PLAN = Path(__file__).with_suffix(".plan")
LENGTH, BATCH, WARM_UP = 64, 32, 20
FIRST = os.environ.get("RANK", "0") == "0"  # whether this process is the one that prints


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.proj(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.ln2(x)))))


class GPT(nn.Module):
    def __init__(self, dim: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, dim), nn.Embedding(LENGTH, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout=0.1) for _ in range(layers))
        self.ln, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        self.head.weight = nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1), targets.flatten())


def batch(text: Tensor, number: int, rows: slice = slice(BATCH)) -> tuple[Tensor, Tensor]:
    """Some rows of the batch with this number: random windows, and the bytes that follow."""
    generator = torch.Generator().manual_seed(number)  # so a resumed run needs no more to go on
    starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)[rows]
    windows = text[starts + torch.arange(LENGTH + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def main(
    data: str = TEXT,
    steps: int = 200,
    folder: Path | None = None,
    every: int = 50,
    plan: Path = PLAN,
) -> list[float]:
    """Train up to step `steps`, evaluate and save every `every` steps, and return the losses."""
    text = torch.from_file(data, size=os.path.getsize(data), dtype=torch.uint8)  # memory-mapped
    training, held_out = text.tensor_split([len(text) * 9 // 10])
    torch.manual_seed(0)
    run = mw.compile(GPT(), mw.Plan.load(plan), example=batch(text, 0)).launch(seed=0)
    no_decay = {"params": ["**.bias", "**.ln*.weight"], "weight_decay": 0.0}
    optimizer = run.optimizer(torch.optim.AdamW, groups=[no_decay], lr=2e-3, weight_decay=0.1)
    warm_up = LinearLR(optimizer, 0.05, total_iters=WARM_UP)
    cosine = CosineAnnealingLR(optimizer, max(1, steps - WARM_UP), eta_min=2e-4)
    schedule = SequentialLR(optimizer, [warm_up, cosine], milestones=[WARM_UP])
    extra = run.load(folder, optimizer, missing_ok=True) if folder else {}
    if extra:
        schedule.load_state_dict(extra["schedule"])
    losses, start = [], extra.get("step", 0)
    with run, Progress(console=Console(quiet=not FIRST), disable=not FIRST) as progress:
        task, began = progress.add_task("training", total=steps, completed=start), time.monotonic()
        for step in range(start + 1, steps + 1):
            loss = run.step_local(*batch(training, step, run.data_slice(BATCH)))
            norm = run.clip_grad_norm_(1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss)
            progress.advance(task)
            if step % 10 == 0:
                seconds, began = time.monotonic() - began, time.monotonic()
                peak = torch.cuda.max_memory_allocated() or 1024 * getrusage(RUSAGE_SELF).ru_maxrss
                progress.print(
                    f"step {step:4}  loss {loss:.3f}  norm {norm:.2f}  "
                    f"{10 * BATCH * LENGTH / seconds:6.0f} tokens/s  {peak / 2**30:.2f} GiB"
                )
            if step % every == 0 or step == steps:
                found = [run.evaluate(*batch(held_out, number)) for number in range(4)]
                progress.print(f"step {step:4}  held out {torch.stack(found).mean():.3f}")
                if folder:
                    extra = {"step": step, "schedule": schedule.state_dict()}
                    run.save(folder, optimizer, extra=extra, keep=3, wait=False)
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=TEXT, help="a file of text")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where checkpoints are, and go")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--plan", type=Path, default=PLAN, help="how it is spread over ranks")
    main(**vars(parser.parse_args()))

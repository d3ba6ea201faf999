"""Train a classifier and resume it where it stopped: a script to begin with.

python examples/train.py                              every rank in this process
meshwright run examples/train.py --processes 4        one process per rank
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import meshwright as mw

PLAN = """
mesh    dp=2, tp=2
data    images, labels over dp
columns blocks.*.up    over tp
rows    blocks.*.down  over tp
"""
PIXELS, CLASSES, BATCH, STEPS = 64, 10, 32, 60
IGNORED = -100  # the label that `cross_entropy` ignores


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Classifier(nn.Module):
    def __init__(self, dim: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(PIXELS, dim), nn.Linear(dim, CLASSES)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels, ignore_index=IGNORED), "logits": logits}


def images(count: int, seed: int) -> Dataset:
    """Noisy pictures of ten shapes: `[count, pixels]`, and which shape each is."""
    shapes = torch.randn(CLASSES, PIXELS, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return TensorDataset(shapes[labels] + torch.randn(count, PIXELS, generator=generator), labels)


def padded(batch: list[Tensor]) -> list[Tensor]:
    """A last batch filled up to the size of the others, with labels that do not count."""
    images, labels = batch
    missing = BATCH - len(labels)
    return [F.pad(images, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=IGNORED)]


def evaluate(run: mw.Run, dataset: Dataset) -> tuple[float, float]:
    """The mean loss and the accuracy over a whole set; every rank reads all of it."""
    loss_sum, num_right, count = 0.0, 0, 0
    for batch in DataLoader(dataset, batch_size=BATCH):
        images, labels = padded(batch)
        loss, logits = run.evaluate(images, labels)
        here = int((labels != IGNORED).sum())
        loss_sum += loss.item() * here
        num_right += int((logits.argmax(-1) == labels).sum())
        count += here
    return loss_sum / count, num_right / count


def batches(run: mw.Run, dataset: Dataset, first: int) -> Iterator[list[Tensor]]:
    """This rank's rows of every batch from step `first` on, in a new order in every epoch."""
    sampler = DistributedSampler(dataset, num_replicas=run.data_ranks, rank=run.data_rank, seed=0)
    loader = DataLoader(dataset, BATCH // run.data_ranks, sampler=sampler, drop_last=True)
    for epoch in itertools.count(first // len(loader)):
        sampler.set_epoch(epoch)
        skipped = first % len(loader) if epoch == first // len(loader) else 0
        yield from itertools.islice(loader, skipped, None)


def save(run: mw.Run, optimizer: Optimizer, schedule: LRScheduler, step: int, folder: Path) -> None:
    """Write a checkpoint, with all that `resume` needs."""
    run.save(folder, optimizer, extra={"step": step, "schedule": schedule.state_dict()})


def resume(run: mw.Run, optimizer: Optimizer, schedule: LRScheduler, folder: Path) -> int:
    """Read what `save` wrote, if anything, and return the number of the next step."""
    extra = run.load(folder, optimizer, missing_ok=True)
    if not extra:
        return 0
    schedule.load_state_dict(extra["schedule"])
    return int(extra["step"])


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def main(steps: int = STEPS, folder: Path | None = None, save_every: int = 20) -> list[float]:
    """Train up to step number `steps`, from the checkpoint in `folder` if there is one."""
    training, held_out = images(1000, seed=1), images(100, seed=2)
    torch.manual_seed(0)
    model = Classifier()
    example = (torch.zeros(BATCH, PIXELS), torch.zeros(BATCH, dtype=torch.long))
    program = mw.compile(model, mw.Plan.parse(PLAN, "train.plan"), example, outputs=["logits"])
    losses = []
    with program.launch(seed=0) as run:
        no_decay = {"params": ["**.bias", "blocks.*.norm.*"], "weight_decay": 0.0}
        optimizer = run.optimizer(torch.optim.AdamW, groups=[no_decay], lr=3e-3, weight_decay=0.1)
        schedule = SequentialLR(
            optimizer,
            [LinearLR(optimizer, 0.1, total_iters=5), CosineAnnealingLR(optimizer, STEPS - 5)],
            milestones=[5],
        )
        first = resume(run, optimizer, schedule, folder) if folder else 0
        for step, batch in zip(range(first, steps), batches(run, training, first), strict=False):
            loss, _ = run.step_local(*batch)
            norm = run.clip_grad_norm_(1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if is_first() and step % 10 == 0:
                print(f"step {step:3}  loss {losses[-1]:.3f}  norm {norm:.2f}", flush=True)
            if folder and (step + 1) % save_every == 0:
                save(run, optimizer, schedule, step + 1, folder)
        loss, accuracy = evaluate(run, held_out)
        if is_first():
            print(f"held out  loss {loss:.3f}  accuracy {accuracy:.2f}", flush=True)
        run.check(optimizer)  # that all copies of weights, gradients and optimizer state are equal
        run.copy_to(model)  # an ordinary model again
        if folder and is_first():
            folder.mkdir(parents=True, exist_ok=True)  # no step may have saved
            torch.save(model.state_dict(), folder / "model.pt")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--folder", type=Path, help="where checkpoints are, and go")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.folder)

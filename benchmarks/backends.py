"""One model on one rank: this compiler with each of its backends, beside torch's own.

python -m benchmarks.backends [--size tiny|base|llama] [--half] [--device cuda] [--rounds N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from benchmarks import clock, llama, report
from benchmarks.gpt import SIZES
from benchmarks.gpu import table
from benchmarks.steps import Batch, batch, gpt, on_one_rank

CLOSE = {False: 5e-6, True: 2e-2}
"""The relative difference of losses from the first peer's, also where they compute in bfloat16."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size", choices=[*SIZES, "llama"], default="tiny", help="or a small Llama"
    )
    parser.add_argument("--half", action="store_true", help="compute in bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--each", type=int, default=5, help="steps in a round")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(argv)
    device = args.device
    given, make = chosen(args.size, device)
    peers = on_one_rank(make, given, device, args.half)
    steps = {name: partial(build(), given) for name, build in peers.items()}
    losses = {name: [step().item() for _ in range(3)][-1] for name, step in steps.items()}
    first = next(iter(losses.values()))
    found = {name: {"loss": loss} for name, loss in losses.items()}
    assert all(abs(loss - first) < CLOSE[args.half] * first for loss in losses.values()), losses
    for taken in clock.interleaved(steps, device, args.rounds, args.each):
        for name, result in clock.times(taken, "meshwright").items():
            found[name] |= result
    print(table(args.size, found))
    report.write(args.json, {args.size: found})


def chosen(size: str, device: str) -> tuple[Batch, Callable[[], nn.Module]]:
    """A batch, and what makes the model that it is for."""
    if size == "llama":
        sizes = llama.SMALL
        shape = sizes.batch, sizes.length
        return batch(sizes.vocab, shape, device), lambda: llama.on_device(sizes, device)
    of = SIZES[size]
    return batch(of.vocab, (of.batch, of.length), device), lambda: gpt(of, device)


if __name__ == "__main__":
    main(sys.argv[1:])

"""One GPT on one rank in float32: this compiler with each of its backends, beside torch's own.

python -m benchmarks.backends [--size tiny|base] [--device cuda] [--rounds N] [--each N]
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks import clock, report
from benchmarks.gpt import SIZES
from benchmarks.gpu import table
from benchmarks.steps import batch, gpt, on_one_rank

CLOSE = 5e-6
"""The relative difference of losses from the first peer's."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--each", type=int, default=5, help="steps in a round")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(argv)
    size, device = SIZES[args.size], args.device
    given = batch(size.vocab, (size.batch, size.length), device)
    peers = on_one_rank(lambda: gpt(size, device), given, device, half=False)
    steps = {name: partial(build(), given) for name, build in peers.items()}
    losses = {name: [step().item() for _ in range(3)][-1] for name, step in steps.items()}
    first = next(iter(losses.values()))
    found = {name: {"loss": loss} for name, loss in losses.items()}
    assert all(abs(loss - first) < CLOSE * first for loss in losses.values()), losses
    for taken in clock.interleaved(steps, device, args.rounds, args.each):
        for name, result in clock.times(taken, "meshwright").items():
            found[name] |= result
    print(table(size.name, found))
    report.write(args.json, {size.name: found})


if __name__ == "__main__":
    main(sys.argv[1:])

"""Peak memory of a process that trains one GPT: Meshwright beside DDP and hand-written parallelism.

    python -m benchmarks.memory [--size tiny|base] [--rounds N] [--quick] [--json FILE]

Each system has processes of its own, started in turns. A peak is the most memory that was resident
from the start to the end of three steps, compiling and launching included, in the largest process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import launch
from benchmarks.data_parallel import build_one as data_parallel
from benchmarks.gpt import SIZES, make_batch
from benchmarks.interleave import Ratio
from benchmarks.tensor_parallel import build_one as tensor_parallel

REFERENCES = {"dp=2": "ddp", "tp=2": "hand-written"}
"""The peer that Meshwright is compared with, by mesh."""
STEPS = 3


def work(args: argparse.Namespace) -> None:
    """One rank of one system: train for some steps; rank 0 writes the largest peak."""
    mesh_text, size_name, out = args.worker
    size = SIZES[size_name]
    torch.set_num_threads(1)
    with launch.ranks(mesh_text) as mesh:
        if mesh_text == "dp=2":
            peer = data_parallel(args.system, size, mesh)
        else:
            peer = tensor_parallel(args.system, size, mesh, "vocab")
        for seed in range(STEPS):
            peer.step(*make_batch(size, seed))
        peak = torch.tensor(_peak(), dtype=torch.int64)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            Path(out).write_text(str(peak.item()))
        del peer


def _peak() -> int:
    """The most bytes that this process has had resident; only Linux says so."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(size) * 1024


def compare(rounds: int, argv: list[str], mesh: str, size: str) -> dict[str, Any]:
    """The peaks of Meshwright and its reference, in turns, and their ratio round by round."""
    systems = ("meshwright", REFERENCES[mesh])
    peaks: dict[str, list[int]] = {system: [] for system in systems}
    for number in range(rounds):
        for system in systems if number % 2 == 0 else systems[::-1]:
            given = [*argv, "--system", system]
            peaks[system].append(launch.run_workers("benchmarks.memory", given, mesh, size))
    ratios = [own / other for own, other in zip(*peaks.values(), strict=True)]
    return {
        "megabytes": {name: round(statistics.median(p) / 2**20) for name, p in peaks.items()},
        "ratio": asdict(Ratio.of(ratios)),
    }


def table(title: str, found: dict[str, Any]) -> str:
    """The result as text."""
    shown = ", ".join(f"{name} {size} MB" for name, size in found["megabytes"].items())
    return f"{title:<12} {shown}: {Ratio(**found['ratio'])}"


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, tuple(REFERENCES))
    parser.add_argument("--system", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args)
    else:
        rounds = 1 if args.quick else args.rounds or 3
        launch.sweep(args, partial(compare, rounds, argv), table)


if __name__ == "__main__":
    main(sys.argv[1:])

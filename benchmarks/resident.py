"""Peak memory of a process that trains one GPT: Meshwright beside DDP and hand-written parallelism.

    python -m benchmarks.resident [--size tiny|base] [--rounds N] [--quick] [--json FILE]

Each system has processes of its own, started in turns. A peak is the most memory that was resident
from the start to the end of three steps, compiling and launching included, in the largest process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import launch
from benchmarks.data_parallel import build_one as data_parallel
from benchmarks.gpt import SIZES, Size, make_batch
from benchmarks.interleave import Ratio
from benchmarks.peers import Peer
from benchmarks.tensor_parallel import build_one as tensor_parallel

REFERENCES = {"dp=2": "ddp", "tp=2": "hand-written"}
"""The peer that Meshwright is compared with, by mesh."""
STEPS = 3


def build(system: str, size: Size, mesh: DeviceMesh) -> Peer:
    if mesh.mesh_dim_names == ("dp",):
        return data_parallel(system, size, mesh)
    return tensor_parallel(system, size, mesh, "vocab")


def work(build: Callable[[str, Size, DeviceMesh], Peer], args: argparse.Namespace) -> None:
    """One rank of one system: train for some steps; rank 0 writes the largest peak."""
    mesh_text, size_name, out = args.worker
    size = SIZES[size_name]
    torch.set_num_threads(1)
    with launch.ranks(mesh_text) as mesh:
        peer = build(args.system, size, mesh)
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
    reference = REFERENCES[mesh]
    taken = peaks("benchmarks.resident", ("meshwright", reference), rounds, argv, mesh, size)
    return {"megabytes": medians(taken), "ratio": asdict(ratio(taken, "meshwright", reference))}


def peaks(
    module: str, systems: Sequence[str], rounds: int, argv: list[str], mesh: str, size: str
) -> dict[str, list[int]]:
    """The peak of each system in each round, in bytes, in processes that run `module`."""
    found: dict[str, list[int]] = {system: [] for system in systems}
    for number in range(rounds):
        for system in systems if number % 2 == 0 else systems[::-1]:
            given = [*argv, "--system", system]
            found[system].append(launch.run_workers(module, given, mesh, size))
    return found


def medians(taken: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The median peak of each system, in MB."""
    return {name: round(statistics.median(sizes) / 2**20) for name, sizes in taken.items()}


def ratio(taken: Mapping[str, Sequence[int]], system: str, reference: str) -> Ratio:
    """The system's peak divided by the reference's, round by round."""
    return Ratio.of([a / b for a, b in zip(taken[system], taken[reference], strict=True)])


def result(taken: Mapping[str, Sequence[int]], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The peaks and their ratios as plain data; a pair is (system, reference)."""
    return {
        "megabytes": medians(taken),
        "ratios": [
            {"peer": own, "reference": other, **asdict(ratio(taken, own, other))}
            for own, other in pairs
        ],
    }


def ratios_table(title: str, found: dict[str, Any]) -> str:
    """What `result` gives, as text."""
    lines = [title]
    lines += [f"  {name:<28}{size:>12}" for name, size in found["megabytes"].items()]
    for entry in found["ratios"]:
        spread = Ratio(entry["median"], entry["low"], entry["high"])
        lines.append(f"  {entry['peer'] + ' / ' + entry['reference']:<52}{spread}")
    return "\n".join(lines)


def tables(title: str, times: Sequence[str], found: dict[str, Any]) -> str:
    """Tables of times and, where it was measured, that of what `result` gives."""
    memory = found.get("memory")
    more = [ratios_table(f"{title}, peak MB of a process", memory)] if memory else []
    return "\n".join((*times, *more))


def table(title: str, found: dict[str, Any]) -> str:
    """The result as text."""
    shown = ", ".join(f"{name} {size} MB" for name, size in found["megabytes"].items())
    return f"{title:<12} {shown}: {Ratio(**found['ratio'])}"


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, tuple(REFERENCES))
    parser.add_argument("--system", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(build, args)
    else:
        rounds = 1 if args.quick else args.rounds or 3
        launch.sweep(args, partial(compare, rounds, argv), table)


if __name__ == "__main__":
    main(sys.argv[1:])

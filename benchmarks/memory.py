"""Step time and peak memory of one GPT that saves less: Meshwright's `checkpoint` and `offload`
beside torch's checkpoints, hooks that move saved tensors, and FSDP2 with CPU offload.

    python -m benchmarks.memory [--size tiny|base] [--mesh dp=2] [--rounds N] [--json FILE]

Over dp=1, `blocks` computes every block again, `segments` runs of blocks, `selective` all but
matrix products and attention, `offload` keeps in host memory what blocks save, and `prefetch` also
begins to bring it back a layer ahead. `fits ...` is Meshwright's `checkpoint budget=`, given the
peak that torch's peer of that name was measured to have. A peak is that of a step in a process of
its own (`benchmarks.allocated`): the memory of tensors on the device, host memory apart, though on
this device both are the same. Times are taken in turns in the same processes. About ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import allocated, launch, report
from benchmarks.gpt import SIZES, Size, make_batch
from benchmarks.peers import Peer

LIMITED = ("blocks", "segments", "selective")
"""The peers of torch that have a peak for `fits`."""
SYSTEMS = {
    "dp=1": [
        *(
            f"{system} {how}"
            for how in ("saved", *LIMITED, "offload")
            for system in ("torch", "meshwright")
        ),
        "meshwright prefetch",
        *(f"meshwright fits {how}" for how in LIMITED),
    ],
    "dp=2": ["fsdp2 offload", "meshwright offloaded"],
}
"""What is measured, by mesh."""
WARM = 2
"""Steps before the one whose peak counts."""


def build_one(system: str, size: Size, mesh: DeviceMesh, budgets: dict[str, int]) -> Peer:
    # A peer's imports take seconds, and no other peer needs them.
    name, how = system.split(" ", 1)
    if name == "torch":
        from benchmarks.peers.saving import torch_saving

        return torch_saving(size, how)
    if name == "fsdp2":
        from benchmarks.peers.sharded import fsdp2

        return fsdp2(size, mesh, reshard=True, offload=True)
    from benchmarks.peers.compiled import saving

    return saving(size, mesh, how, budgets.get(how.removeprefix("fits ")))


def build(size: Size, mesh: DeviceMesh, args: argparse.Namespace) -> list[Peer]:
    return [build_one(system, size, mesh, args.budgets) for system in args.systems.split(",")]


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each of ours and the other peer that does the same, or has the peak that it was given."""
    others = {name.split(" ", 1)[1]: name for name in names if not name.startswith("meshwright")}
    found = []
    for name in names:
        how = name.split(" ", 1)[1].removeprefix("fits ")
        if name.startswith("meshwright"):
            same = "offload" if how in ("prefetch", "offloaded") else how
            found.append((name, others[same]))
    return found


def measure(args: argparse.Namespace, argv: list[str], mesh: str, size: str) -> dict[str, Any]:
    """The peak of a step of each system, the times of all, and the ratios of both."""
    systems = args.systems.split(",") if args.systems else SYSTEMS[mesh]
    peaks: dict[str, int] = {}
    budgets: dict[str, int] = {}
    for system in systems:
        given = [*argv, "--budgets", json.dumps(budgets), "--system", system]
        peaks[system] = launch.run_workers("benchmarks.memory", given, mesh, size)
        name, how = system.split(" ", 1)
        if name == "torch":
            budgets[how] = peaks[system]
    given = [*argv, "--budgets", json.dumps(budgets), "--systems", ",".join(systems)]
    found = launch.run_workers("benchmarks.memory", given, mesh, size)
    found["peaks"] = peaks
    for entry in found["ratios"]:
        entry["peak"] = peaks[entry["peer"]] / peaks[entry["reference"]]
    return found


def work(args: argparse.Namespace) -> None:
    """One rank of one system: rank 0 writes the peak of a step, the largest of all ranks."""
    mesh_text, size_name, out = args.worker
    size = SIZES[size_name]
    torch.set_num_threads(1)
    with launch.ranks(mesh_text) as mesh:
        batches = [make_batch(size, seed) for seed in range(WARM)]
        found = allocated.peak(
            partial(build_one, args.system, size, mesh, args.budgets),
            lambda peer: [peer.step(*batch) for batch in batches],
            lambda peer: peer.step(*batches[0]),
        )
        peak = torch.tensor(found)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            Path(out).write_text(str(peak.item()))


def table(title: str, found: dict[str, Any]) -> str:
    """The results of one mesh and size as text."""
    lines = [report.table(title, found), f"  {'peak of a step':<28}{'MB':>12}"]
    lines += [f"  {name:<28}{size / 2**20:>12.1f}" for name, size in found["peaks"].items()]
    for entry in found["ratios"]:
        lines.append(f"  {entry['peer']} / {entry['reference']:<40}{entry['peak']:.3f}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, tuple(SYSTEMS))
    parser.add_argument("--systems", help="only these, separated by commas")
    parser.add_argument("--system", help=argparse.SUPPRESS)
    parser.add_argument("--budgets", type=json.loads, default={}, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker and args.system:
        work(args)
    elif args.worker:
        launch.work(build, pairs, args)
    else:
        launch.sweep(args, partial(measure, args, argv), table)


if __name__ == "__main__":
    main(sys.argv[1:])

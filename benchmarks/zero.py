"""One GPT whose state is sharded over data-parallel ranks: torch's FSDP2, torch's DDP with
`ZeroRedundancyOptimizer`, and Meshwright's `zero 1`, `zero 2` and `zero 3`.

    python -m benchmarks.zero [--size tiny|base] [--mesh dp=4] [--rounds N] [--quick] [--json FILE]

Step times of all of them, taken in turns in the same processes: of a whole batch, of one in four
microbatches, and of one that computes in bfloat16. Then the peak memory of each, in
processes of its own. About twelve minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from benchmarks import launch, report, resident
from benchmarks.gpt import Size
from benchmarks.interleave import TOLERANCE
from benchmarks.peers import Peer

MESHES = ("dp=2",)
MORE_MESHES = ("dp=4",)
OURS = ("zero-1", "zero-2", "zero-3")
PEERS = ("fsdp2-resharded", "fsdp2-kept", "ddp-zero")
VARIANTS = ("whole", "accumulate", "bf16")
MICROBATCHES = 4
"""Of the variant that accumulates."""
TOLERANCES = {"bf16": 2e-2}
"""Relative difference of losses: torch's are rounded to bfloat16, which has 8 bits."""
ROUNDS = {"tiny": 7, "base": 3}
MEMORY_ROUNDS = {"tiny": 1, "base": 2}


def build_one(system: str, size: Size, mesh: DeviceMesh, variant: str = "whole") -> Peer:
    # A peer's imports take seconds, and no other peer needs them.
    microbatches, bf16 = MICROBATCHES if variant == "accumulate" else 1, variant == "bf16"
    if system in OURS:
        from benchmarks.peers.compiled import meshwright

        feature = f"zero {system[-1]}"
        return meshwright(size, mesh, feature, microbatches=microbatches, bf16=bf16)
    from benchmarks.peers.sharded import ddp_zero, fsdp2

    if system == "ddp-zero":
        return ddp_zero(size, mesh, microbatches)
    return fsdp2(size, mesh, system == "fsdp2-resharded", microbatches, bf16)


def build(size: Size, mesh: DeviceMesh, args: argparse.Namespace) -> list[Peer]:
    systems = args.systems.split(",")
    if args.variant == "bf16":
        systems = [system for system in systems if system != "ddp-zero"]  # has no such mode
    return [build_one(system, size, mesh, args.variant) for system in systems]


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each of ours and each other peer."""
    ours = [name for name in names if name.startswith("meshwright")]
    return [(own, other) for own in ours for other in names if other not in ours]


def measure(
    args: argparse.Namespace, argv: list[str], mesh: str, size: str
) -> dict[str, dict[str, Any]]:
    """The step times of each variant, and the peaks, by what they are called."""
    found = {}
    for variant in args.variants.split(","):
        given = [*argv, "--variant", variant, "--rounds", str(args.rounds or ROUNDS[size])]
        found[variant] = launch.run_workers("benchmarks.zero", given, mesh, size)
    if not args.no_memory:
        systems = args.systems.split(",")
        rounds = 1 if args.quick else MEMORY_ROUNDS[size]
        taken = resident.peaks("benchmarks.zero", systems, rounds, argv, mesh, size)
        own = [system for system in systems if system in OURS]
        both = [(a, b) for a in own for b in systems if b not in OURS]
        found["memory"] = resident.result(taken, both)
    return found


def table(title: str, found: dict[str, dict[str, Any]]) -> str:
    """The results of one mesh and size as text."""
    times = [
        report.table(f"{title}, {variant}", each)
        for variant, each in found.items()
        if variant != "memory"
    ]
    return resident.tables(title, times, found)


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, (*MESHES, *MORE_MESHES))
    parser.set_defaults(meshes=MESHES)
    parser.add_argument("--systems", default=",".join((*PEERS, *OURS)))
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of the step times")
    parser.add_argument("--no-memory", action="store_true", help="only the step times")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--system", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker and args.system:
        resident.work(build_one, args)
    elif args.worker:
        launch.work(build, pairs, args, TOLERANCES.get(args.variant, TOLERANCE))
    else:
        launch.sweep(args, partial(measure, args, argv), table)


if __name__ == "__main__":
    main(sys.argv[1:])

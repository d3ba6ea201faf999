"""One GPT on four ranks: blocks over two axes (`summa`, 2 x 2) beside columns and rows (tp=4).

    python -m benchmarks.tensor_2d [--size tiny|base] [--rounds N] [--quick] [--json FILE]

Step times at an equal batch, taken in turns in the same processes; the bytes that a rank sends in a
step; and the peak memory of each, resident in processes of its own and as predicted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from benchmarks import launch, report, resident
from benchmarks.gpt import SIZES, Size
from benchmarks.peers import Peer
from benchmarks.peers.compiled import TENSOR_FORMS, in_form, program_in

MESHES = ("tp=4",)
MEMORY_ROUNDS = {"tiny": 1, "base": 3}


def build_one(system: str, size: Size, mesh: DeviceMesh) -> Peer:
    return in_form(size, system)


def build(size: Size, mesh: DeviceMesh, args: argparse.Namespace) -> list[Peer]:
    return [build_one(system, size, mesh) for system in args.systems.split(",")]


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each form in blocks and the one with columns and rows."""
    (flat,) = (name for name in names if name.endswith("columns"))
    return [(name, flat) for name in names if name != flat]


def counted(size: Size, system: str) -> dict[str, int]:
    """What a rank sends in a step, and what it needs, as the compiler counts them: in bytes."""
    program = program_in(size, system)
    memory = program.memory()
    return {
        "sent": program.comm().total_bytes(),
        "collectives": program.comm().times(),
        "saved": memory.activations,
        "peak": memory.peak,
    }


def measure(args: argparse.Namespace, argv: list[str], mesh: str, size: str) -> dict[str, Any]:
    systems = args.systems.split(",")
    found: dict[str, Any] = {
        "times": launch.run_workers("benchmarks.tensor_2d", argv, mesh, size),
        "counted": {system: counted(SIZES[size], system) for system in systems},
    }
    if not args.no_memory:
        rounds = 1 if args.quick else MEMORY_ROUNDS[size]
        taken = resident.peaks("benchmarks.tensor_2d", systems, rounds, argv, mesh, size)
        both = [(system, "columns") for system in systems if system != "columns"]
        found["memory"] = resident.result(taken, both)
    return found


def table(title: str, found: dict[str, Any]) -> str:
    """The results of one size as text."""
    lines = [report.table(title, found["times"]), f"{title}, counted: MB per rank per step"]
    for system, own in found["counted"].items():
        sizes = (f"{name} {own[name] / 2**20:.1f}" for name in ("sent", "saved", "peak"))
        lines.append(f"  {system:<12} {', '.join(sizes)}; {own['collectives']} collectives")
    return resident.tables(title, lines, found)


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, MESHES)
    parser.add_argument("--systems", default=",".join(TENSOR_FORMS))
    parser.add_argument("--no-memory", action="store_true", help="only the step times")
    parser.add_argument("--system", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker and args.system:
        resident.work(build_one, args)
    elif args.worker:
        launch.work(build, pairs, args)
    else:
        launch.sweep(args, partial(measure, args, argv), table)


if __name__ == "__main__":
    main(sys.argv[1:])

"""One GPT in pipeline stages: torch's `torch.distributed.pipelining`, and Meshwright.

    python -m benchmarks.pipeline [--size tiny|base] [--mesh pp=4] [--rounds N] [--quick]
                                  [--schedules 1f1b,zbv] [--systems meshwright,late] [--json FILE]

Step times under GPipe, 1F1B, interleaved 1F1B, zero bubble and ZB-V, each with the same stages and
eight microbatches in both systems, taken in turns in the same processes. Then the peak memory of
each, in processes of its own. About fifteen minutes. The system `late` is Meshwright with every
gradient sent after the whole backward, as autograd does, and not before its weight gradients.
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
from benchmarks.stages import VIRTUAL, balanced, fits

MESHES = ("pp=2",)
MORE_MESHES = ("pp=4",)
SYSTEMS = ("meshwright", "torch")
MORE_SYSTEMS = ("late",)
MEMORY_ROUNDS = {"tiny": 1, "base": 2}


def build_one(name: str, size: Size, mesh: DeviceMesh) -> Peer:
    """The peer of that name, such as `torch 1f1b`."""
    system, schedule = name.split()
    cut = balanced(size, schedule, mesh.size())
    # A peer's imports take seconds, and no other peer needs them.
    if system == "torch":
        from benchmarks.peers.pipelining import torch_pipeline

        return torch_pipeline(size, mesh, cut)
    from benchmarks.peers.compiled import pipeline

    return pipeline(size, mesh, cut, system)


def build(size: Size, mesh: DeviceMesh, args: argparse.Namespace) -> list[Peer]:
    return [build_one(name, size, mesh) for name in names(args, size, mesh.size())]


def names(args: argparse.Namespace, size: Size, ranks: int) -> list[str]:
    """The peers, without schedules that have more stages than there are blocks to fill them."""
    schedules = [each for each in args.schedules.split(",") if fits(size, each, ranks)]
    return [f"{system} {each}" for each in schedules for system in args.systems.split(",")]


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Ours and each other system's, by schedule."""
    own, *others = (*SYSTEMS, *MORE_SYSTEMS)
    found = [
        (f"{own} {schedule}", f"{other} {schedule}") for schedule in VIRTUAL for other in others
    ]
    return [pair for pair in found if set(pair) <= set(names)]


def measure(args: argparse.Namespace, argv: list[str], mesh: str, size: str) -> dict[str, Any]:
    """The step times of all peers, and their peaks."""
    module = "benchmarks.pipeline"
    found = {"time": launch.run_workers(module, argv, mesh, size)}
    if not args.no_memory:
        peers = names(args, SIZES[size], int(mesh.removeprefix("pp=")))
        rounds = 1 if args.quick else MEMORY_ROUNDS[size]
        taken = resident.peaks(module, peers, rounds, argv, mesh, size)
        found["memory"] = resident.result(taken, pairs(peers))
    return found


def table(title: str, found: dict[str, Any]) -> str:
    """The results of one mesh and size as text."""
    return resident.tables(title, [report.table(title, found["time"])], found)


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, (*MESHES, *MORE_MESHES))
    parser.set_defaults(meshes=MESHES)
    parser.add_argument("--schedules", default=",".join(VIRTUAL))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
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

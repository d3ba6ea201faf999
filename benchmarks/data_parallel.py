"""One GPT, data-parallel: torch's DDP, one flat all-reduce by hand, and Meshwright.

python -m benchmarks.data_parallel [--size tiny|base] [--rounds N] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch.distributed.device_mesh import DeviceMesh

from benchmarks import launch
from benchmarks.gpt import Size
from benchmarks.peers import Peer
from benchmarks.peers.ddp import ddp, flat

MESHES = ("dp=2",)
SYSTEMS = ("ddp", "flat", "meshwright")


def build(size: Size, mesh: DeviceMesh, args: argparse.Namespace) -> list[Peer]:
    return [build_one(system, size, mesh) for system in args.systems.split(",")]


def build_one(system: str, size: Size, mesh: DeviceMesh) -> Peer:
    if system == "ddp":
        return ddp(size, mesh)
    if system == "flat":
        return flat(size, mesh)
    from benchmarks.peers.compiled import meshwright

    return meshwright(size, mesh)


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    found = [("meshwright", "ddp"), ("meshwright", "flat"), ("flat", "ddp")]
    return [pair for pair in found if pair[0] in names and pair[1] in names]


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, MESHES)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    launch.main("benchmarks.data_parallel", build, pairs, parser, argv)


if __name__ == "__main__":
    main(sys.argv[1:])

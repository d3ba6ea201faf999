"""One GPT, tensor-parallel: torch's DTensor, hand-written Megatron style, and Meshwright.

python -m benchmarks.tensor_parallel [--size tiny|base] [--rounds N] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch.distributed.device_mesh import DeviceMesh

from benchmarks import launch
from benchmarks.gpt import Size
from benchmarks.peers import FEATURES, Peer

MESHES = ("tp=2", "dp=2, tp=2")
SYSTEMS = ("dtensor", "hand-written", "meshwright")


def build(size: Size, mesh: DeviceMesh, args: argparse.Namespace) -> list[Peer]:
    return [
        build_one(system, size, mesh, feature)
        for feature in args.features.split(",")
        for system in args.systems.split(",")
    ]


def build_one(system: str, size: Size, mesh: DeviceMesh, feature: str) -> Peer:
    # A peer's imports take seconds, and no other peer needs them.
    if system == "dtensor":
        from benchmarks.peers.dtensor import dtensor

        return dtensor(size, mesh, feature)
    if system == "hand-written":
        from benchmarks.peers.megatron import megatron

        return megatron(size, mesh, feature)
    from benchmarks.peers.compiled import meshwright

    return meshwright(size, mesh, feature)


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Ours and each other peer at the same level, then the two others."""
    found = []
    for feature in FEATURES:
        ours, hand, torchs = (
            f"{system} {feature}" for system in ("meshwright", "hand-written", "dtensor")
        )
        found += [(ours, torchs), (ours, hand), (hand, torchs)]
    return [pair for pair in found if pair[0] in names and pair[1] in names]


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, MESHES)
    parser.add_argument("--features", default=",".join(FEATURES))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    launch.main("benchmarks.tensor_parallel", build, pairs, parser, argv)


if __name__ == "__main__":
    main(sys.argv[1:])

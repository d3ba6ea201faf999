"""The cost of comparing inputs between ranks: one GPT without it, with the default, and with it at
every step.

python -m benchmarks.input_check [--size tiny|base] [--rounds N] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch.distributed.device_mesh import DeviceMesh

from benchmarks import launch
from benchmarks.gpt import Size
from benchmarks.peers import Peer
from benchmarks.peers.compiled import meshwright

MESHES = ("tp=2", "dp=2")
CHECKS: dict[str, bool | int] = {"off": False, "default": True, "every-step": 1}


def build(size: Size, mesh: DeviceMesh, args: argparse.Namespace) -> list[Peer]:
    peers = [meshwright(size, mesh, "vocab", check_inputs=check) for check in CHECKS.values()]
    return [Peer("meshwright", name, peer.step) for name, peer in zip(CHECKS, peers, strict=True)]


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, "meshwright off") for name in names if name != "meshwright off"]


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, MESHES)
    launch.main("benchmarks.input_check", build, pairs, parser, argv)


if __name__ == "__main__":
    main(sys.argv[1:])

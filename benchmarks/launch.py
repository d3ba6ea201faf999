"""The command line and the processes of benchmarks that compare peers."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks import report
from benchmarks.gpt import SIZES, Size
from benchmarks.interleave import TOLERANCE, check, measure
from benchmarks.peers import Peer

STEPS = {"tiny": 20, "base": 1}
"""Steps that a peer takes in each of its turns."""
ROUNDS = {"tiny": 15, "base": 7}
Build = Callable[[Size, DeviceMesh, argparse.Namespace], Sequence[Peer]]
Pairs = Callable[[Sequence[str]], Sequence[tuple[str, str]]]


def parser(description: str | None, meshes: Sequence[str]) -> argparse.ArgumentParser:
    """The options of every benchmark that compares peers on `meshes`."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--size", choices=(*SIZES, "both"), default="both")
    found.add_argument("--mesh", choices=meshes, help="only this one")
    found.set_defaults(meshes=meshes)
    found.add_argument("--rounds", type=int, default=0, help="turns per peer (default: by size)")
    found.add_argument("--quick", action="store_true", help="one round of one step: does it run?")
    found.add_argument("--json", type=Path, help="write the results there")
    found.add_argument("--worker", nargs=3, metavar=("MESH", "SIZE", "OUT"), help=argparse.SUPPRESS)
    return found


def main(
    module: str, build: Build, pairs: Pairs, options: argparse.ArgumentParser, argv: list[str]
) -> None:
    """Time the peers that `build` makes for each mesh and size, in processes that run `module`."""
    args = options.parse_args(argv)
    if args.worker:
        work(build, pairs, args)
    else:
        sweep(args, partial(run_workers, module, argv), report.table)


def sweep(
    args: argparse.Namespace,
    measure: Callable[[str, str], dict[str, Any]],
    table: Callable[[str, dict[str, Any]], str],
) -> None:
    """Print and write what `measure(mesh, size)` finds for each mesh and size asked for."""
    results: dict[str, Any] = {}
    for size in SIZES if args.size == "both" else (args.size,):
        for mesh in (args.mesh,) if args.mesh else args.meshes:
            title = f"{size}, {mesh}"
            results[title] = measure(mesh, size)
            print(table(title, results[title]), flush=True)
    report.write(args.json, results)


def run_workers(module: str, argv: list[str], mesh: str, size: str) -> Any:
    """Start one process per rank of `mesh`, by torchrun, and return what rank 0 has written."""
    processes = 1
    for axis in mesh.split(", "):
        processes *= int(axis.split("=")[1])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={processes}", "-m", module]
        worker = ["--worker", mesh, size, str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *argv, *worker], check=True, env=environment)
        return json.loads(out.read_text())


def work(
    build: Build, pairs: Pairs, args: argparse.Namespace, tolerance: float = TOLERANCE
) -> None:
    """One rank: build the peers, check their losses, time them; rank 0 writes the result."""
    mesh_text, size_name, out = args.worker
    size = SIZES[size_name]
    torch.set_num_threads(1)
    # The newer names of collectives are not in every torch that this runs on.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    with ranks(mesh_text) as mesh:
        found = compare(build(size, mesh, args), pairs, size, args, tolerance)
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(found))


def compare(
    peers: Sequence[Peer],
    pairs: Pairs,
    size: Size,
    args: argparse.Namespace,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Check every peer's losses, then time them in turns."""
    differences = check(peers, size, tolerance)
    if args.quick:
        taken = measure(peers, size, rounds=1, steps=1, patience=0)
    else:
        taken = measure(peers, size, args.rounds or ROUNDS[size.name], STEPS[size.name])
    return report.result(taken, differences, pairs([peer.name for peer in peers]))


@contextmanager
def ranks(mesh_text: str) -> Iterator[DeviceMesh]:
    """The process group and torch's mesh for a text such as `dp=2, tp=2`."""
    axes = dict(axis.split("=") for axis in mesh_text.split(", "))
    dist.init_process_group("gloo")
    try:
        sizes = tuple(int(size) for size in axes.values())
        yield init_device_mesh("cpu", sizes, mesh_dim_names=tuple(axes))
    finally:
        # Without this, or with a DDP still alive, about half of the processes abort at exit:
        # Gloo's threads outlive the interpreter.
        gc.collect()
        dist.destroy_process_group()

"""The time to compile a 96-layer GPT of GPT-3's width for meshes of up to 1,024 ranks, on one core.

    python -m benchmarks.compile_time [--layers 96] [--quick] [--json FILE]

The model is on the meta device; nothing is allocated. Each mesh has a process of its own, so that
no cache of one helps another; imports are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpt import GPT, SIZES, Size

GPT3 = Size("gpt3", vocab=51200, d=12288, heads=96, layers=96, length=2048, batch=1024)
MESHES = ((2, 2), (4, 4), (8, 32), (32, 32), (128, 8), (64, 1))
"""Ranks over dp and over tp; without the latter, weights are sharded by `zero 3`."""
QUICK = ((2, 2),)
PLAN = """
mesh     dp={dp}, tp={tp}
let      heads = {heads}
data     tokens, targets over dp
columns  blocks.*.qkv    over tp as (heads 3 hd)
rows     blocks.*.proj   over tp
columns  blocks.*.up     over tp
rows     blocks.*.down   over tp
vocab    wte, head       over tp
sequence blocks.*        over tp
"""
SHARDED = """
mesh dp={dp}
data tokens, targets over dp
zero 3 over dp
"""


def compile_once(size: Size, dp: int, tp: int) -> dict[str, Any]:
    """The seconds that `compile` takes in this process, and its peak memory in MB."""
    import meshwright as mw

    torch.set_num_threads(1)
    with torch.device("meta"):
        model = GPT(size)
        batch = torch.zeros(2, size.batch, size.length, dtype=torch.int64).unbind()
    text = PLAN if tp > 1 else SHARDED
    plan = mw.Plan.parse(text.format(dp=dp, tp=tp, heads=size.heads))
    start = time.perf_counter()
    program = mw.compile(model, plan, example=tuple(batch))
    _ = program.digest  # includes the generated code, which a run needs
    seconds = time.perf_counter() - start
    nodes = sum(len(graph.nodes) for graph in program.graphs().values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ranks": dp * tp, "seconds": seconds, "nodes": nodes, "peak_mb": round(peak)}


def in_own_process(layers: int, dp: int, tp: int, quick: bool) -> dict[str, Any]:
    """`compile_once` in a fresh process on one core."""
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "benchmarks.compile_time", "--layers", str(layers)]
    command += ["--mesh", str(dp), str(tp)] + ["--quick"] * quick
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=GPT3.layers)
    parser.add_argument("--quick", action="store_true", help="a tiny model on 2 x 2: does it run?")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--mesh", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    size = SIZES["tiny"] if args.quick else replace(GPT3, layers=args.layers)
    if args.mesh:
        print(json.dumps(compile_once(size, *args.mesh)))
        return
    print(f"{size.layers} layers, d {size.d}, on one core")
    print(f"  {'mesh':<18}{'ranks':>6}{'seconds':>10}{'nodes':>8}{'peak MB':>9}")
    results: dict[str, Any] = {}
    for dp, tp in QUICK if args.quick else MESHES:
        title = f"dp={dp}, tp={tp}" if tp > 1 else f"dp={dp}, zero 3"
        found = results[title] = in_own_process(args.layers, dp, tp, args.quick)
        print(
            f"  {title:<18}{found['ranks']:>6}{found['seconds']:>10.2f}"
            f"{found['nodes']:>8}{found['peak_mb']:>9}",
            flush=True,
        )
    report.write(args.json, results)


if __name__ == "__main__":
    main(sys.argv[1:])

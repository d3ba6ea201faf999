"""All that a GPU is to show, in one command of at most eight minutes, and a table and JSON of it.

    python -m benchmarks.gpu [--device cpu] [--parts equal,one] [--json FILE]

Needs torch 2.11 or later, numpy, lark, rich and a GPU. Where nothing can be installed, carry them:

    pip install --target build/carried --no-deps lark rich markdown-it-py mdurl pygments
    PYTHONPATH=src:build/carried python -m benchmarks.gpu

Each part runs in processes of its own, so that one that fails costs no other: `equal` trains under
plans on the virtual mesh, beside eager; `one` times GPT-2 and a Llama of a billion parameters on
one rank, beside eager and compiled eager; `virtual` times the virtual mesh; `processes` has two and
four processes share the device, through host memory and Gloo; `nccl` runs NCCL's collectives in a
group of one; `offload` times copies to the host, and how much of them computing hides. With
`--device cpu` the same code runs on small models; it measures nothing that is worth reading.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from benchmarks import clock, llama, report
from benchmarks.gpt import SIZES, Size
from benchmarks.steps import DATA, ONE, Batch, Eager, Ours, batch, gpt, on_one_rank

Result: TypeAlias = dict[str, Any]
Found: TypeAlias = Iterator[tuple[str, Result]]
"""What a part finds: more and more about each of what it measures, by name."""
GPT2 = Size("gpt2", vocab=50304, d=768, heads=12, layers=12, length=1024, batch=8)
TENSOR = """
columns blocks.*.qkv over tp as (heads 3 hd)
rows blocks.*.proj over tp
columns blocks.*.up over tp
rows blocks.*.down over tp
"""
PLANS = {
    "data": "mesh dp=4\n" + DATA,
    "tensor, vocab, sequence": "mesh dp=2, tp=2\n" + DATA + "let heads = 4\n" + TENSOR
    + "vocab wte, head over tp\nsequence blocks.* over tp\n",
    "zero 3, microbatches": "mesh dp=2\n" + DATA + "zero 3 over dp\naccumulate 2\n",
    "pipeline": "mesh pp=2\ndata tokens, targets\n"
     "stages at blocks.2 over pp schedule=zb microbatches=4\n",
    "ring": "mesh cp=2\ncontext blocks.* over cp\n",
    "blocks": "mesh r=2, c=2\nsumma blocks.* over (r, c)\n",
    "checkpoint": "mesh dp=2\n" + DATA + "checkpoint blocks.*\n",
    "offload": "mesh dp=2\n" + DATA + "offload activations blocks.*\noffload optimizer\n",
}  # fmt: skip
CLOSE = 1e-10
"""The relative difference from eager in float64."""
SECONDS = 460
"""For all parts together on a GPU, so that eight minutes are enough."""


# -- the parts ------------------------------------------------------------------------------------


def equal(device: str) -> Found:
    """The largest relative difference from eager's losses and parameters after three steps in
    float64, and in bfloat16 that of losses from float64, beside eager's own."""
    size = SIZES["tiny"]
    batches = [batch(size.vocab, (size.batch, size.length), device, seed) for seed in range(3)]
    exact = Eager(gpt(size, device, torch.float64), device, False)
    wanted = [exact(each).item() for each in batches]
    narrow = Eager(gpt(size, device), device, True)
    yield "eager", {"bf16": _off([narrow(each).item() for each in batches], wanted)}
    beside = partial(_beside, size=size, device=device, given=batches, exact=exact, wanted=wanted)
    for name, plan in PLANS.items():
        yield name, _attempt(partial(beside, plan))
    compiled = "zero 3, microbatches"
    yield f"{compiled}, inductor", _attempt(partial(beside, PLANS[compiled], backend="inductor"))


def _beside(
    plan: str,
    *,
    size: Size,
    device: str,
    given: list[Batch],
    exact: Eager,
    wanted: list[float],
    backend: str = "eager",
) -> Result:
    model = gpt(size, device, torch.float64)
    ours = Ours(model, plan, given[0], device, backend=backend)
    losses = _off([ours(each).item() for each in given], wanted)
    state, held = ours.run.state_dict(), exact.model.state_dict()
    values = max(((held[name] - state[name].to(device)).abs().max().item()) for name in held)
    narrow = plan + "precision bf16\n"
    half = Ours(gpt(size, device), narrow, given[0], device, backend=backend)
    rough = _off([half(each).item() for each in given], wanted)
    good = "yes" if max(losses, values) < CLOSE else "NO"
    return {"equal": good, "losses": losses, "parameters": values, "bf16": rough}


def _off(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def one(device: str) -> Found:
    """Step time, memory and waits of one rank in bfloat16, beside eager and compiled eager."""
    size, shape = _gpt2(device)
    sizes = llama.SMALL if device == "cpu" else llama.BILLION
    models: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
        "gpt2": (lambda: gpt(size, device), batch(size.vocab, shape, device)),
        "llama": (
            lambda: llama.on_device(sizes, device),
            batch(sizes.vocab, (sizes.batch, sizes.length), device),
        ),
    }
    for name, (make, given) in models.items():
        peers = on_one_rank(make, given, device, half=True)
        for peer, result in _compared(peers, given, device, 3):
            yield f"{name} {peer}", result


def virtual(device: str) -> Found:
    """Step time of the virtual mesh with more and more ranks on one device."""
    plans = {f"{n} ranks": f"mesh dp={n}\n{DATA}" for n in (1, 2, 4, 8)}
    yield from _plans(plans, device)


def offload(device: str) -> Found:
    """What activations in host memory cost, and the share of copies that computing hides."""
    plans = {
        "saved": "",
        "checkpoint": "checkpoint blocks.*\n",
        "offload": "offload activations blocks.*\n",
        "half offload": "offload activations blocks.* fraction=0.5\n",
    }
    yield from _plans({name: ONE + more for name, more in plans.items()}, device)


def _plans(plans: Mapping[str, str], device: str) -> Found:
    """GPT-2 in bfloat16 under each of multiple plans."""
    size, shape = _gpt2(device)
    given = batch(size.vocab, shape, device)

    def peer(plan: str) -> Ours:
        return Ours(gpt(size, device), plan + "precision bf16\n", given, device)

    peers = {name: partial(peer, plan) for name, plan in plans.items()}
    yield from _compared(peers, given, device, 2)


def _gpt2(device: str) -> tuple[Size, tuple[int, int]]:
    """A model, and the shape of a batch."""
    size = SIZES["tiny"] if device == "cpu" else GPT2
    return size, (size.batch, size.length)


def _compared(
    peers: Mapping[str, Callable[[], Eager | Ours]], given: Batch, device: str, each: int
) -> Found:
    """Look at a step of each peer by itself, then time all that could be built, beside the first
    of them."""
    steps: dict[str, clock.Step] = {}
    for name, build in peers.items():
        yield name, _attempt(partial(_alone, name, build, given, device, steps))
    rounds, each = (1, 1) if device == "cpu" else (5, each)
    for taken in clock.interleaved(steps, device, rounds, each):
        yield from clock.times(taken).items()


def _alone(
    name: str,
    build: Callable[[], Eager | Ours],
    given: Batch,
    device: str,
    steps: dict[str, clock.Step],
) -> Result:
    """The first loss of a peer, the seconds until it is warm, its memory, and its time before any
    other is there, in case that there is none to compare it; adds its step."""
    gc.collect()
    held, begin = clock.Held(device), time.perf_counter()
    step = partial(build(), given)
    first, *_ = [step().item() for _ in range(3)]
    ready = time.perf_counter() - begin
    found = {"loss": first, "ready s": ready, "peak MB": held.peak(step) / 2**20}
    (taken,) = clock.interleaved({name: step}, device, rounds=1, each=3)
    found |= {"alone ms": taken[name][0]} | clock.profiled(step, device)
    steps[name] = step
    return found


def processes(device: str) -> Found:
    """Losses and step times of two and four processes that share the device, beside one process."""
    size = SIZES["tiny"]
    given = [batch(size.vocab, (size.batch, size.length), device, seed) for seed in range(3)]
    eager = Eager(gpt(size, device, torch.float64), device, False)
    wanted = [eager(each).item() for each in given]
    plans = {
        "dp=2": (2, "mesh dp=2\n" + DATA),
        "dp=2, tp=2": (4, PLANS["tensor, vocab, sequence"]),
        "pipeline": (2, PLANS["pipeline"]),
    }
    for name, (count, plan) in plans.items():
        result = _attempt(partial(_ranks, plan, count, device))
        if "losses" in result:
            off = _off(result.pop("losses"), wanted)
            result |= {"equal": "yes" if off < CLOSE else "NO", "losses": off}
        yield name, result


def _ranks(plan: str, count: int, device: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={count}", "-m", "benchmarks.gpu"]
        command += ["--device", device, "--rank", plan, str(out)]
        environment = {**os.environ, "MESHWRIGHT_THROUGH_HOST": "1", "OMP_NUM_THREADS": "1"}
        if failed := _run(command, environment, 40 if device == "cuda" else 240):
            raise RuntimeError(failed)
        found: Result = json.loads(out.read_text())
        return found


def rank(plan: str, out: str, device: str) -> None:
    """One process of `processes`: three steps whose losses count, then those that are timed."""
    size = SIZES["tiny"]
    given = [batch(size.vocab, (size.batch, size.length), device, seed) for seed in range(3)]
    ours = Ours(gpt(size, device, torch.float64), plan, given[0], device)
    losses = [ours(each).item() for each in given]
    begin, steps = time.perf_counter(), 10
    for _ in range(steps):
        ours(given[0])
    clock.wait(device)
    taken = (time.perf_counter() - begin) * 1e3 / steps
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps({"losses": losses, "ms": taken}))
    ours.run.close()


def nccl(device: str) -> Found:
    """Each collective in a group of one process, by NCCL (on a CPU, by Gloo)."""
    from torch._C._distributed_c10d import HashStore

    from meshwright.compiler.layout.wires import WIRES, Wire, everyone
    from meshwright.runtime.transports.gloo import GlooGroup
    from meshwright.runtime.transports.nccl import NcclGroup

    group = (NcclGroup if device == "cuda" else GlooGroup)(HashStore(), (0,), 0, 60.0)

    def tried(kind: str, dtype: torch.dtype) -> Result:
        wire, given = Wire(kind, ("dp",)), torch.arange(12, device=device).to(dtype).view(1, 3, 4)
        works, finish = group.begin(wire, given.clone(), True, False)
        for work in works:
            work.wait()
        good = finish().equal(everyone(wire, [given])[0])
        return {"equal": "yes" if good else "NO"}

    kinds = [kind for kind, row in WIRES.items() if not row.counted and kind != "transfer"]
    for kind in kinds:
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            name = str(dtype).removeprefix("torch.")
            yield f"{kind} {name}", _attempt(partial(tried, kind, dtype))
    group.close()


PARTS: dict[str, tuple[Callable[[str], Found], float]] = {
    "equal": (equal, 75), "one": (one, 220), "virtual": (virtual, 40),
    "processes": (processes, 65), "nccl": (nccl, 20), "offload": (offload, 40),
}  # fmt: skip
"""What each part measures, and the most seconds that it may take on a GPU."""


# -- running them ---------------------------------------------------------------------------------


def _attempt(measure: Callable[[], Result]) -> Result:
    """What is measured, or the error: the others are measured all the same."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[-600:]}


def _run(
    command: list[str], environment: Mapping[str, str], seconds: float, *, apart: bool = False
) -> str:
    """Run a command for at most so many seconds, and say how it failed; "" if it did not.

    `apart` gives it a process group of its own, which ends as a whole."""
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=apart
        ) as started,
    ):
        try:
            code = started.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(started, apart)
            return f"stopped after {seconds:.0f} s"
        said.seek(0)
        return f"exit code {code}: {said.read()[-500:]}" if code else ""


def _end(started: subprocess.Popen[bytes], apart: bool) -> None:
    """Ask a process to end what it has started and itself, and soon see to it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if apart:
            os.killpg(started.pid, number)
        else:
            started.send_signal(number)
        try:
            started.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue


def part(name: str, out: Path, device: str) -> None:
    """Write what a part finds, as soon as it does: it may be stopped."""
    found: dict[str, Result] = {}
    for key, result in PARTS[name][0](device):
        found.setdefault(key, {}).update(result)
        new = out.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.replace(out)


def in_process(name: str, device: str, seconds: float) -> dict[str, Result]:
    """The results of a part, from a process of its own, and how it failed if it did."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", device]
        failed = _run([*command, "--part", name, str(out)], os.environ, seconds, apart=True)
        found: dict[str, Result] = json.loads(out.read_text()) if out.exists() else {}
        return found | ({"all else": {"error": failed}} if failed else {})


def table(title: str, found: Mapping[str, Result]) -> str:
    """Results as text: a line each."""
    lines = [f"\n{title}"]
    for key, result in found.items():
        lines.append(f"  {key:<34}" + "  ".join(f"{k} {_spelled(v)}" for k, v in result.items()))
    return "\n".join(lines)


def _spelled(value: Any) -> str:
    if isinstance(value, list):
        middle, low, high = value
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS), help="only these, between commas")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--rank", nargs=2, metavar=("PLAN", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank:
        rank(*args.rank, args.device)
    elif args.part:
        name, out = args.part
        part(name, Path(out), args.device)
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; `--device cpu` runs the same code on small models")
    else:
        return sweep(args)
    return 0


def sweep(args: argparse.Namespace) -> int:
    """Run each part, print and write what it finds; 1 if anything failed or differs."""
    results: dict[str, dict[str, Any]] = {}
    if args.device == "cuda":
        results["device"] = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    start = time.perf_counter()
    for name in args.parts.split(","):
        begin = time.perf_counter()
        seconds = min(PARTS[name][1], max(SECONDS - (begin - start), 1))
        seconds = seconds if args.device == "cuda" else 1800
        results[name] = in_process(name, args.device, seconds)
        title = f"{name} ({time.perf_counter() - begin:.0f} s)"
        print(table(title, results[name]), flush=True)
        report.write(args.json, results)
    return int(any(word in json.dumps(results) for word in ('"error"', '"NO"')))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

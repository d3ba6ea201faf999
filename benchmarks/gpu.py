"""All that a GPU is to show, in one command of at most eight minutes, and a table and JSON of it.

    python -m benchmarks.gpu [--device cpu] [--parts equal,one] [--json FILE]

Needs torch 2.11 or later, one GPU, and lark and rich. For a machine without an index, carry them:

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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import meshwright as mw
from benchmarks import clock, llama, report
from benchmarks.gpt import GPT, SIZES, Size
from benchmarks.llama import Llama

Batch = tuple[Tensor, Tensor]
GPT2 = Size("gpt2", vocab=50304, d=768, heads=12, layers=12, length=1024, batch=8)
TENSOR = """
columns blocks.*.qkv over tp as (heads 3 hd)
rows blocks.*.proj over tp
columns blocks.*.up over tp
rows blocks.*.down over tp
"""
DATA = "data tokens, targets over dp\n"
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
ONE = "mesh dp=1\n" + DATA
CLOSE = 1e-10
"""The relative difference from eager in float64."""


def gpt(size: Size, device: str, dtype: torch.dtype = torch.float32) -> GPT:
    """A GPT with a tied head, the same for every peer."""
    torch.manual_seed(0)
    model = GPT(size)
    nn.init.normal_(model.wte.weight, std=0.02)
    model.head.weight = model.wte.weight
    return model.to(device, dtype)


def batch(vocab: int, shape: tuple[int, int], device: str, seed: int = 0) -> Batch:
    """Tokens and targets."""
    drawn = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(0, vocab, shape, generator=drawn) for _ in range(2))
    return tokens.to(device), targets.to(device)


def launched(model: nn.Module, plan: str, example: Batch, device: str, **options: Any) -> mw.Run:
    """A run of the model, which is let go of."""
    program = mw.compile(model, mw.Plan.parse(plan), example, device=device)
    return program.launch(**options)


class Eager:
    """Torch's own steps: forward, backward and update, under autocast if the type is half."""

    def __init__(self, model: nn.Module, device: str, half: bool, *, compiled: bool = False):
        self.model, self.autocast = model, nullcontext
        if half:
            self.autocast = partial(torch.autocast, device, dtype=torch.bfloat16)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.call = torch.compile(model) if compiled else model

    def __call__(self, given: Batch) -> Tensor:
        with self.autocast():
            loss = self.call(*given)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Ours:
    """The same steps of a compiled program."""

    def __init__(self, model: nn.Module, plan: str, given: Batch, device: str, **options: Any):
        self.run = launched(model, plan, given, device, check_finite=False, **options)
        self.optimizer = self.run.optimizer(torch.optim.AdamW, lr=1e-4)

    def __call__(self, given: Batch) -> Tensor:
        loss = self.run.step(*given)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


# -- the parts ------------------------------------------------------------------------------------


def equal(device: str) -> dict[str, Any]:
    """The largest relative difference from eager's losses and parameters after three steps in
    float64, and in bfloat16 that of losses from float64, beside eager's own."""
    size = SIZES["tiny"]
    batches = [batch(size.vocab, (size.batch, size.length), device, seed) for seed in range(3)]
    exact = Eager(gpt(size, device, torch.float64), device, False)
    wanted = [exact(each).item() for each in batches]
    narrow = Eager(gpt(size, device), device, True)
    rough = {"bf16 eager": _off([narrow(each).item() for each in batches], wanted)}
    return {
        name: _attempt(partial(_beside, plan, size, device, batches, exact, wanted)) | rough
        for name, plan in PLANS.items()
    }


def _beside(
    plan: str, size: Size, device: str, batches: list[Batch], exact: Eager, wanted: list[float]
) -> dict[str, Any]:
    ours = Ours(gpt(size, device, torch.float64), plan, batches[0], device)
    losses = _off([ours(each).item() for each in batches], wanted)
    state, held = ours.run.state_dict(), exact.model.state_dict()
    values = max(((held[name] - state[name].to(device)).abs().max().item()) for name in held)
    half = Ours(gpt(size, device), plan + "precision bf16\n", batches[0], device)
    rough = _off([half(each).item() for each in batches], wanted)
    good = "yes" if max(losses, values) < CLOSE else "NO"
    return {"equal": good, "losses": losses, "parameters": values, "bf16": rough}


def _off(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def one(device: str) -> dict[str, Any]:
    """Step time, memory and waits of one rank in bfloat16, beside eager and compiled eager."""
    small = device == "cpu"
    size, sizes = (SIZES["tiny"], llama.SMALL) if small else (GPT2, llama.BILLION)
    models: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
        "gpt2": (
            lambda: gpt(size, device),
            batch(size.vocab, (size.batch, size.length), device),
        ),
        "llama": (
            lambda: Llama(sizes).to(device),
            batch(sizes.vocab, (sizes.batch, sizes.length), device),
        ),
    }
    found = {}
    for name, (make, given) in models.items():
        rounds, each = (1, 1) if small else (5, 5)
        taken = _compared(_peers(make, given, device), given, device, rounds, each)
        found |= {f"{name} {peer}": result for peer, result in taken.items()}
    return found


def _peers(
    make: Callable[[], nn.Module], given: Batch, device: str
) -> dict[str, Callable[[], Any]]:
    """The ways to train a model on one rank; what others are compared with comes first."""
    return {
        "compiled eager": lambda: Eager(make(), device, True, compiled=True),
        "eager": lambda: Eager(make(), device, True),
        "meshwright": lambda: Ours(make(), ONE + "precision bf16\n", given, device),
    }


def virtual(device: str) -> dict[str, Any]:
    """Step time of the virtual mesh with more and more ranks on one device."""
    size = SIZES["tiny"] if device == "cpu" else GPT2
    given = batch(size.vocab, (size.batch, size.length), device)
    peers = {
        f"{n} ranks": partial(
            lambda n: Ours(
                gpt(size, device), f"mesh dp={n}\n{DATA}precision bf16\n", given, device
            ),
            n,
        )
        for n in (1, 2, 4, 8)
    }
    return _compared(peers, given, device, 1 if device == "cpu" else 5, 2)


def offload(device: str) -> dict[str, Any]:
    """What activations in host memory cost, and the share of copies that computing hides."""
    size = SIZES["tiny"] if device == "cpu" else GPT2
    given = batch(size.vocab, (size.batch, size.length), device)
    plans = {
        "saved": "",
        "checkpoint": "checkpoint blocks.*\n",
        "offload": "offload activations blocks.*\n",
        "half offload": "offload activations blocks.* fraction=0.5\n",
    }
    peers = {
        name: partial(
            lambda more: Ours(gpt(size, device), ONE + "precision bf16\n" + more, given, device),
            more,
        )
        for name, more in plans.items()
    }
    return _compared(peers, given, device, 1 if device == "cpu" else 5, 2)


def _compared(
    peers: Mapping[str, Callable[[], Any]], given: Batch, device: str, rounds: int, each: int
) -> dict[str, Any]:
    """Look at a step of each peer by itself, then time all that could be built, beside the first
    of them."""
    steps: dict[str, clock.Step] = {}
    found = {
        name: _attempt(partial(_alone, name, build, given, device, steps))
        for name, build in peers.items()
    }
    taken = clock.interleaved(steps, device, rounds, each)
    for name, result in clock.times(taken).items():
        found[name] |= result
    return found


def _alone(
    name: str,
    build: Callable[[], Any],
    given: Batch,
    device: str,
    steps: dict[str, clock.Step],
) -> dict[str, Any]:
    """The first loss of a peer, the seconds until it is warm, and its memory; adds its step."""
    gc.collect()
    held, begin = clock.Held(device), time.perf_counter()
    step = partial(build(), given)
    first, *_ = [step().item() for _ in range(3)]
    ready = time.perf_counter() - begin
    found = {"loss": first, "ready s": ready, "peak MB": held.peak(step) / 2**20}
    found |= clock.profiled(step, device)
    steps[name] = step
    return found


def processes(device: str) -> dict[str, Any]:
    """Losses and step times of two and four processes that share the device, beside one process."""
    size = SIZES["tiny"]
    given = [batch(size.vocab, (size.batch, size.length), device, seed) for seed in range(3)]
    found = {}
    for name, plan in {
        "dp=2": "mesh dp=2\n" + DATA,
        "dp=2, tp=2": PLANS["tensor, vocab, sequence"],
        "pipeline": PLANS["pipeline"],
    }.items():
        eager = Eager(gpt(size, device, torch.float64), device, False)
        wanted = [eager(each).item() for each in given]
        ranks = 4 if "tp" in name else 2
        result = _attempt(partial(_ranks, plan, ranks, device))
        if "losses" in result:
            off = _off(result.pop("losses"), wanted)
            result |= {"equal": "yes" if off < CLOSE else "NO", "losses": off}
        found[name] = result
    return found


def _ranks(plan: str, count: int, device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rank.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={count}", "-m", "benchmarks.gpu"]
        command += ["--device", device, "--rank", plan, str(out)]
        environment = {**os.environ, "MESHWRIGHT_THROUGH_HOST": "1", "OMP_NUM_THREADS": "1"}
        _run(command, environment, 150)
        found: dict[str, Any] = json.loads(out.read_text())
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


def nccl(device: str) -> dict[str, Any]:
    """Each collective in a group of one process, by NCCL (on a CPU, by Gloo)."""
    from torch._C._distributed_c10d import HashStore

    from meshwright.compiler.layout.wires import WIRES, Wire, everyone
    from meshwright.runtime.transports.gloo import GlooGroup
    from meshwright.runtime.transports.nccl import NcclGroup

    group = (NcclGroup if device == "cuda" else GlooGroup)(HashStore(), (0,), 0, 60.0)

    def tried(kind: str, dtype: torch.dtype) -> dict[str, Any]:
        wire, given = Wire(kind, ("dp",)), torch.arange(12, device=device).to(dtype).view(1, 3, 4)
        works, finish = group.begin(wire, given.clone(), True, False)
        for work in works:
            work.wait()
        good = finish().equal(everyone(wire, [given])[0])
        return {"equal": "yes" if good else "NO"}

    kinds = [kind for kind, row in WIRES.items() if not row.counted and kind != "transfer"]
    found = {
        f"{kind} {str(dtype).removeprefix('torch.')}": _attempt(partial(tried, kind, dtype))
        for kind in kinds
        for dtype in (torch.float32, torch.bfloat16, torch.int64)
    }
    group.close()
    return found


PARTS: dict[str, tuple[Callable[[str], dict[str, Any]], float]] = {
    "equal": (equal, 90), "one": (one, 210), "virtual": (virtual, 60),
    "processes": (processes, 150), "nccl": (nccl, 30), "offload": (offload, 60),
}  # fmt: skip
"""What each part measures, and the most seconds that it may take."""


# -- running them ---------------------------------------------------------------------------------


def _attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is measured, or the error: the others are measured all the same."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[-600:]}


def _run(command: list[str], environment: dict[str, str], seconds: float) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-500:]}")


def in_process(part: str, device: str) -> dict[str, Any]:
    """The results of a part, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--device", device]
        _run([*command, "--part", part, str(out)], dict(os.environ), PARTS[part][1])
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def table(part: str, found: Mapping[str, Any], seconds: float) -> str:
    """The results of a part as text: a line each."""
    lines = [f"\n{part} ({seconds:.0f} s)"]
    for name, result in found.items():
        shown = result if isinstance(result, dict) else {"error": result}
        lines.append(f"  {name:<28}" + "  ".join(f"{k} {_spelled(v)}" for k, v in shown.items()))
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
        Path(out).write_text(json.dumps(PARTS[name][0](args.device)))
    else:
        return sweep(args)
    return 0


def sweep(args: argparse.Namespace) -> int:
    """Run each part, print and write what it finds; 1 if anything failed or differs."""
    results: dict[str, Any] = {}
    if args.device == "cuda":
        results["device"] = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for part in args.parts.split(","):
        begin = time.perf_counter()
        results[part] = _attempt(partial(in_process, part, args.device))
        print(table(part, results[part], time.perf_counter() - begin), flush=True)
        report.write(args.json, results)
    return int(any(word in json.dumps(results) for word in ('"error"', '"NO"')))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

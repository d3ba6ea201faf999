"""Mixtures of experts in one process: routes at equal active compute, and Mixtral.

    python -m benchmarks.experts [--size tiny|base] [--rounds N] [--quick] [--json FILE]

Under each route the GPT computes as much per token as the dense one: two experts of half its width,
or one as wide. What brings tokens to experts and back is timed kernel by kernel. Mixtral is that of
Hugging Face, small and random: its own module in eager mode, and the same under a plan.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from benchmarks import allocated, launch, report
from benchmarks.gpt import ADAMW, GPT, SIZES, Block, Size, attention, make_batch
from benchmarks.interleave import Ratio, measure
from benchmarks.peers import Peer
from meshwright.compiler.kernels import experts as kernels

EXPERTS = 8
LAYERS = {"tiny": 4, "base": 2}
ROUTES = {"topk": 2, "switch": 1, "prototype": 2, "dropless": 2}
"""How many experts each token has, by route; `dropless` is `topk` without a capacity."""
SYSTEMS = ("dense", *ROUTES, "transformers", "meshwright")
"""The GPTs by route, and Mixtral in both systems."""
MOVING = ("dispatch", "combine", "combine_weight")
"""The kernels that bring tokens to experts and back, forward and backward."""
WARM = 3
TOLERANCE = 1e-5
"""Relative difference of Mixtral's losses, which are summed in other orders, in float32."""


class Mlp(nn.Module):
    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, width), nn.Linear(width, d)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class MlpBlock(Block):
    """A block of the GPT, with its feed-forward part in a module of its own."""

    def __init__(self, d: int, heads: int, width: int) -> None:
        super().__init__(d, heads)
        del self.up, self.down
        self.mlp = Mlp(d, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(attention(self.qkv(self.ln1(x)), self.head_dim))
        y: Tensor = x + self.mlp(self.ln2(x))
        return y


def gpt(size: Size, route: str) -> Peer:
    """The GPT under a route, or `dense`; experts with a capacity take their share of tokens and no
    more."""
    top = ROUTES.get(route, 1)
    torch.manual_seed(0)
    model = GPT(size)
    model.blocks = nn.ModuleList(
        MlpBlock(size.d, size.heads, 4 * size.d // top) for _ in range(size.layers)
    )
    options = "dropless=true" if route == "dropless" else f"route={route} capacity=1"
    statement = f"experts blocks.*.mlp over ep count={EXPERTS} {options}"
    if top > 1:
        statement += f" top={top}"
    plan = "mesh ep=1\n" + ("" if route == "dense" else statement)
    run = mw.compile(model, mw.Plan.parse(plan), example=make_batch(size)).launch()
    return _trained("meshwright", route, run.step, run.optimizer(torch.optim.AdamW, **ADAMW))


def mixtral(size: Size, system: str) -> Peer:
    """Hugging Face's module as it is, or under a plan for one rank."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=size.vocab, hidden_size=size.d, intermediate_size=2 * size.d,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2, num_local_experts=EXPERTS, num_experts_per_tok=2,
        max_position_embeddings=size.length, use_cache=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()

    if system == "transformers":
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

        def forward(tokens: Tensor, targets: Tensor) -> Tensor:
            loss: Tensor = model(input_ids=tokens, labels=targets).loss
            loss.backward()
            return loss.detach()

        return _trained(system, "mixtral", forward, optimizer)
    tokens, targets = make_batch(size)
    example = {"input_ids": tokens, "labels": targets}
    run = mw.compile(model, mw.Plan.parse("mesh ep=1\n"), example=example).launch()

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        return run.step(input_ids=tokens, labels=targets)

    return _trained(system, "mixtral", step, run.optimizer(torch.optim.AdamW, **ADAMW))


def _trained(system: str, feature: str, step: Callable[..., Tensor], optimizer: Any) -> Peer:
    def trained(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = step(tokens, targets)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Peer(system, feature, trained)


def build(system: str, size: Size) -> Peer:
    return (gpt if system in ("dense", *ROUTES) else mixtral)(size, system)


def warm(peers: Sequence[Peer], size: Size) -> dict[str, float]:
    """Train each for some steps; by how much Mixtral's losses differ, which may be little."""
    losses = {
        peer.name: torch.stack([peer.step(*make_batch(size, seed)) for seed in range(WARM)])
        for peer in peers
    }
    found = dict.fromkeys(losses, 0.0)
    own, other = (losses.get(f"{system} mixtral") for system in ("meshwright", "transformers"))
    if own is not None and other is not None:
        off = found["meshwright mixtral"] = ((own - other).abs() / other).max().item()
        assert off < TOLERANCE, f"losses {own} instead of {other}"
    return found


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each route and the dense model; Mixtral and its own module."""
    ours = [name for name in names if name.split()[-1] in ROUTES]
    wanted = [(name, "meshwright dense") for name in ours]
    wanted.append(("meshwright mixtral", "transformers mixtral"))
    return [pair for pair in wanted if set(pair) <= set(names)]


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """The CPU seconds that each of `MOVING` takes in programs that are launched and run inside."""
    spent = dict.fromkeys(MOVING, 0.0)
    kept = {name: getattr(kernels, name) for name in MOVING}

    def timing(name: str) -> Callable[..., Any]:
        @wraps(kept[name])
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.thread_time()
            result = kept[name](*args, **kwargs)
            spent[name] += time.thread_time() - begun
            return result

        return run

    try:
        for name in MOVING:
            setattr(kernels, name, timing(name))
        yield spent
    finally:
        for name, kernel in kept.items():
            setattr(kernels, name, kernel)


def moving(system: str, size: Size, steps: int) -> list[float]:
    """The share of the CPU time of each step that `MOVING` take."""
    batch, found = make_batch(size), []
    with timed() as spent:
        peer = build(system, size)
        warm([peer], size)
        for _ in range(steps):
            spent.update(dict.fromkeys(spent, 0.0))
            begun = time.thread_time()
            peer.step(*batch)
            found.append(sum(spent.values()) / (time.thread_time() - begun))
    return found


def peak(system: str, size: Size) -> int:
    """The most bytes of tensors in a step."""
    batch = make_batch(size)
    return allocated.peak(
        partial(build, system, size),
        lambda peer: warm([peer], size),
        lambda peer: peer.step(*batch),
    )


def work(args: argparse.Namespace) -> None:
    """One process: the times of all systems and the shares, or with `--system` the peak of one."""
    mesh, name, out = args.worker
    size = replace(SIZES[name], layers=LAYERS[name])
    torch.set_num_threads(1)
    with launch.ranks(mesh):
        found: Any = peak(args.system, size) if args.system else compared(args, name, size)
        Path(out).write_text(json.dumps(found))


def compared(args: argparse.Namespace, name: str, size: Size) -> dict[str, Any]:
    systems = args.systems.split(",")
    peers = [build(system, size) for system in systems]
    differences = warm(peers, size)
    rounds, steps = args.rounds or launch.ROUNDS[name], launch.STEPS[name]
    options = {"rounds": 1, "steps": 1, "patience": 0} if args.quick else {}
    taken = measure(peers, size, **{"rounds": rounds, "steps": steps, **options})
    found = report.result(taken, differences, pairs([peer.name for peer in peers]))
    tokens = size.batch * size.length
    for each in found["milliseconds"].values():
        each["tokens per second"] = round(1e3 * tokens / each["median"])
    repeats = 1 if args.quick else max(steps, 5)
    # Without a capacity there are no slots: products take rows by their numbers.
    routed = (system for system in systems if system in ROUTES and system != "dropless")
    found["moving"] = {
        f"meshwright {system}": Ratio.of(moving(system, size, repeats)).__dict__
        for system in routed
    }
    return found


def run(args: argparse.Namespace, argv: list[str], mesh: str, size: str) -> dict[str, Any]:
    found = launch.run_workers("benchmarks.experts", argv, mesh, size)
    assert isinstance(found, dict)
    found["peaks"] = {
        system: launch.run_workers("benchmarks.experts", [*argv, "--system", system], mesh, size)
        for system in (() if args.no_memory else args.systems.split(","))
    }
    return found


def table(title: str, found: dict[str, Any]) -> str:
    """The results of one size as text."""
    lines = [report.table(title, found), f"{title}, tokens per second"]
    for name, times in found["milliseconds"].items():
        lines.append(f"  {name:<28}{times['tokens per second']:>12}")
    lines.append(f"{title}, the part of a step that dispatch and combine take")
    for name, share in found["moving"].items():
        lines.append(f"  {name:<28}{Ratio(**share)}")
    lines.append(f"{title}, peak MB of tensors in a step")
    lines += [f"  {name:<28}{size / 2**20:>12.1f}" for name, size in found["peaks"].items()]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = launch.parser(__doc__, ("ep=1",))
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="separated by commas")
    parser.add_argument("--no-memory", action="store_true", help="only times")
    parser.add_argument("--system", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args)
    else:
        launch.sweep(args, partial(run, args, argv), table)


if __name__ == "__main__":
    main(sys.argv[1:])

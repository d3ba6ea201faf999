"""Segments: what of a graph is fused, and that fused code computes what the calls compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from meshwright.compiler.codegen.instructions import Copy, Instructions, Segment, Variable
from meshwright.compiler.codegen.linking import RandomState, RankContext
from meshwright.compiler.codegen.printing import printed
from meshwright.compiler.codegen.segments import segment_key, segmented
from meshwright.runtime import inductor

TENSOR = "mesh tp=2\ncolumns layers.*.up over tp\nrows layers.*.down over tp\n"
PLANS = {
    "tensor": TENSOR,
    "checkpoint": f"{TENSOR}checkpoint layers.*\n",
    "zero": "mesh dp=2\ndata x over dp\naccumulate 2\nzero 3 over dp\n",
    "offload": "mesh dp=2\ndata x over dp\noffload activations layers.* prefetch=0\n",
    "stages": "mesh pp=2\ndata x\nstages at layers.1 over pp microbatches=2 schedule=zb\n",
    "bf16": f"{TENSOR}precision bf16\n",
    "experts": "mesh ep=2\ndata x over ep\nexperts layers.* over ep count=4 route=topk top=2\n",
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.up(self.norm(x))) * 0.5 + 1
        return x + F.dropout(self.down(h), 0.2, self.training)


class Layers(nn.Module):
    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


X = torch.randn(8, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def batch(plan: str) -> Tensor:
    return X.float() if "bf16" in plan else X


def compiled(plan: str, num_layers: int = 2) -> mw.Program:
    torch.manual_seed(0)
    model = Layers(num_layers).to(batch(plan).dtype)
    return mw.compile(model, mw.Plan.parse(plan), example=(batch(plan),))


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest absolute difference of tensors of the same names."""
    assert found.keys() == wanted.keys()
    return max((found[name] - each).abs().max().item() for name, each in wanted.items())


def unlinked(segment: Segment, context: RankContext) -> Callable[[list[Any]], Sequence[Any]]:
    raise NotImplementedError


def in_segments(program: mw.Program) -> list[Instructions]:
    return [segmented(each, inductor.is_fused, unlinked) for each in program.instructions]


def segments(program: mw.Program) -> list[Segment]:
    return [s for each in in_segments(program) for s in each.body if isinstance(s, Segment)]


def contexts(program: mw.Program) -> list[RankContext]:
    return [
        RankContext(program.mesh, program.mesh.coords(rank), program.device, RandomState(), {})
        for rank in range(program.mesh.num_ranks)
    ]


def emptied(function: Callable[..., Any], given: Sequence[Tensor]) -> inductor.Compiled:
    """Stands for a compiler: a function that runs call after call, and empties its list."""

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        tensors = tuple(inputs)
        inputs.clear()
        found: list[Tensor] = function(*tensors)
        return found

    return run


def test_calls_between_exchanges_become_one_and_writes_into_buckets_follow(
    golden: Callable[[str, str], None],
) -> None:
    program = compiled(TENSOR, num_layers=1)
    golden("segments", "\n".join(printed(each).source for each in in_segments(program)))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_code_in_segments_computes_what_the_calls_compute(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "_fused", emptied)
    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(inductor, "check_compiler", lambda device: None)
    program = compiled(plan)
    found = []
    for backend in ("eager", "inductor"):
        with program.launch(backend=backend, seed=3) as run:
            losses = torch.stack([run.step(batch(plan)), run.step(batch(plan))])
            found.append({"loss": losses, **run.gradients()})
    assert inductor._compiled
    assert difference(found[0], found[1]) == 0


def test_equal_segments_of_equal_layers_and_of_all_ranks_have_one_key() -> None:
    def keys(num_layers: int) -> set[Any]:
        program = compiled(TENSOR, num_layers)
        return {
            segment_key(segment, context)
            for segment in segments(program)
            for context in contexts(program)
        }

    assert keys(3) == keys(5)


def test_segments_of_unlike_operators_or_constants_have_unlike_keys() -> None:
    program = compiled(TENSOR, 1)
    context = contexts(program)[0]
    keys = [segment_key(segment, context) for segment in segments(program)]
    assert len(set(keys)) == len(keys) > 2


def test_a_segment_lets_go_of_what_the_calls_let_go_of() -> None:
    for instructions in in_segments(compiled(TENSOR)):
        freed: set[Variable] = set()
        for each in instructions.body:
            if isinstance(each, Segment):
                assert freed.isdisjoint(each.inputs)
                freed.update(each.freed)
                assert freed.isdisjoint(each.results)


def test_a_segment_ends_where_it_would_hold_the_gradients_of_multiple_matrices() -> None:
    held: list[int] = []
    for instructions in in_segments(compiled("mesh dp=2\ndata x over dp\nprecision bf16\n")):
        copied = [each for each in instructions.body if isinstance(each, Copy)]
        matrices = {each.source for each in copied if len(each.node.type.shape) > 1}
        found = [each for each in instructions.body if isinstance(each, Segment)]
        held += [len(matrices.intersection(each.results)) for each in found]
    assert max(held) == 1

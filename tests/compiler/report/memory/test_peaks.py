"""Memory: what is predicted of a step and its update is what they need, rank by rank, to the byte.

Measured is what torch's allocator gives out while one rank trains, alone in this process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.graph import aliasing
from meshwright.compiler.graph.ir import INPUT, SAVED
from meshwright.compiler.program import STAGING_BYTES
from meshwright.compiler.report.memory.prediction import walks
from meshwright.passes.statements.offloading import amount
from meshwright.runtime.optimizers import chunks
from tests.alone import ADAMW, Train, measured, measured_by_place, train_with
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens
from tests.passes.experts.dense import Model
from tests.passes.test_loops import PLANS


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload what models of tests save, which is little."""
    monkeypatch.setattr(amount, "SMALL_BYTES", 0)


SLOW = pytest.mark.slow


def check(model: nn.Module, plan: str, example: Any, train: Train = ADAMW) -> None:
    """The peak of each rank that does what others do not, and where multiple hold parts of the
    same, the highest."""
    program = meshwright.compile(model.train(), meshwright.Plan.parse(plan), example)
    memories, found = program.memories(), dict[str, int]()
    for rank in program.different_ranks:
        place, size = program.place(rank), measured(program, example, rank, train)
        found[place] = max(size, found.get(place, 0))
    assert found.keys() == memories.keys()
    for place, each in memories.items():
        # Every number that an operator is given may take 16 bytes.
        assert found[place] <= each.peak <= 1.002 * found[place] + 16
        assert each.peak == sum(each.parts.values()) == sum(one.bytes for one in each.alive)
        # The first step, which makes tables of random numbers, is not in the timeline.
        assert each.peak >= max(moment.most for moment in each.timeline)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 48, (8, 8)), torch.randint(0, 48, (8, 8))


@pytest.mark.parametrize(
    "plan",
    [
        "mesh dp=4\n" + GPT_DATA,
        "mesh tp=4\n" + GPT_TENSOR,
        "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + "vocab wte, head over tp\n",
        "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR + "sequence blocks.* over tp\n",
    ],
    ids=["data", "tensor", "vocab", "sequence"],
)
def test_the_peak_of_a_gpt_is_the_one_that_is_measured(plan: str) -> None:
    check(Gpt(p=0.1), plan, batch())


def test_the_peak_of_mixtures_of_experts_is_the_one_that_is_measured() -> None:
    # A step does not keep what the one before has reported.
    plan = "mesh ep=2\ndata x, labels over ep\nexperts blocks.*.mlp over ep count=4\n"
    check(Model(1), plan, (torch.randn(4, 6, 8), torch.randint(0, 5, (4, 6))))


@pytest.mark.parametrize("name", ["data", "micro alone", "sequence"])
@pytest.mark.parametrize("level", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_the_peak_of_microbatches_is_the_one_that_is_measured(name: str, level: int) -> None:
    zero = f"zero {level} over dp\n" if level and name != "micro alone" else ""
    check(Gpt(p=0.1), PLANS[name] + zero, tokens())
    if zero:
        check(Gpt(p=0.1), re.sub("accumulate.*\n", "", PLANS[name] + zero), tokens())


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("data", "checkpoint blocks.*"),
        ("data", "zero 3 over dp\nprecision bf16\ncheckpoint blocks.* segments=1"),
        ("micro alone", "checkpoint blocks.* keep=[linear]"),
        ("sequence", "zero 2 over dp\ncheckpoint blocks.* segments=2 keep=[sdpa]"),
        ("sequence", 'zero 3 over dp\ncheckpoint ""\ncheckpoint blocks.*, blocks.*.{qkv,up}'),
        ("sequence", "zero 3 over dp\ncheckpoint blocks.* keep=[sdpa]\noffload activations"),
    ],
)
@pytest.mark.parametrize("micro", [False, pytest.param(True, marks=SLOW)])
def test_the_peak_of_what_is_computed_again_is_the_one_that_is_measured(
    name: str, plan: str, micro: bool
) -> None:
    before = PLANS[name] if micro else re.sub("accumulate.*\n", "", PLANS[name])
    check(Gpt(p=0.1), f"{before}{plan}\n", tokens())


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("options", ["blocks.*", 'prefetch=3 to=disk path="{}"'])
def test_the_peak_of_what_is_kept_elsewhere_is_the_one_that_is_measured(
    name: str, options: str, tmp_path: Path
) -> None:
    line = f"offload activations {options.format(tmp_path)}\n"
    zero = "zero 3 over dp\n" if "dp" in PLANS[name] else ""
    check(Gpt(p=0.1), PLANS[name] + zero + line, tokens())


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("data", "zero 3 over dp\noffload parameters\n"),
        ("data", "offload parameters blocks.* fraction=0.5\noffload optimizer\n"),
        ("sequence", 'zero 2 over dp\noffload parameters to=disk path="{}"\n'),
        ("sequence", 'offload activations\noffload optimizer to=disk path="{}"\n'),
        pytest.param(
            "data", "offload optimizer blocks.*\nprecision bf16 master=bf16\n", marks=SLOW
        ),
    ],
)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {}),
        pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, marks=SLOW),
        pytest.param(torch.optim.RMSprop, {"foreach": True}, marks=SLOW),
    ],
)
def test_the_peak_of_a_training_elsewhere_is_the_one_that_is_measured(
    name: str, lines: str, kind: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    plan = PLANS[name] + lines.format(tmp_path)
    program = meshwright.compile(Gpt(p=0.1), meshwright.Plan.parse(plan), tokens())
    memory = program.memory(kind, **options)
    found = measured_by_place(program, tokens(), 0, train_with(kind, **options))
    staging = STAGING_BYTES if str(tmp_path) in plan else 0
    for place, size in (
        ("device", memory.peak),
        ("host", memory.host - staging),
        ("disk", memory.disk),
    ):
        assert found[place] <= size <= 1.005 * found[place] + 16


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "foreach": True}])
def test_an_update_elsewhere_needs_what_it_makes_of_one_chunk(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 64 * 64 * 4)
    example, plan = (torch.randn(8, 64),), "mesh dp=1\ndata x over dp\noffload optimizer\n"
    program = meshwright.compile(Stack(6), meshwright.Plan.parse(plan), example)
    memory = program.memory(torch.optim.SGD, lr=0.1, **options)
    found = measured_by_place(program, example, 0, train_with(torch.optim.SGD, lr=0.1, **options))
    assert found["host"] <= memory.host <= found["host"] + 64
    assert found["device"] <= memory.peak <= found["device"] + 64
    # Parameters, gradients and momentum, and of the last chunk what is made before it is kept.
    kept = 3 * 6 * 64 * 64 * 4
    assert kept < memory.host <= kept + 2 * 64 * 64 * 4 + 64


@pytest.mark.parametrize("name", ["data", "micro alone"])
@pytest.mark.parametrize("level", [0, 3])
def test_large_buckets_have_memory_from_where_they_are_first_written(
    name: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aliasing, "ALLOCATED_BYTES", 1)
    zero = f"zero {level} over dp\n" if level and name != "micro alone" else ""
    plan = re.sub("accumulate.*\n", "", PLANS[name]) if name == "data" else PLANS[name]
    check(Gpt(p=0.1), plan + zero, tokens())


@pytest.mark.parametrize(
    ("name", "micro", "plan"),
    [
        ("data", False, "precision bf16"),
        ("data", False, "zero 1 over dp\nprecision fp16 keep=[matmul]"),
        ("data", False, "zero 3 over dp\nprecision bf16 reduce=bf16"),
        ("data", True, "zero 2 over dp\nprecision bf16 master=bf16"),
        ("tensor", True, "precision bf16 keep=norm"),
        ("sequence", True, "zero 3 over dp\nprecision fp16"),
    ],
)
def test_the_peak_in_16_bits_is_the_one_that_is_measured(name: str, micro: bool, plan: str) -> None:
    before = PLANS[name] if micro else re.sub("accumulate.*\n", "", PLANS[name])
    check(Gpt(p=0.1 if micro else 0.0), f"{before}{plan}\n", tokens())


class Filter(nn.Module):
    """A filter of complex frequencies, and a head in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16).double()
        self.gains = nn.Parameter(torch.randn(17, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        filtered = torch.fft.irfft(torch.fft.rfft(self.up(x)) * self.gains, n=32)
        return self.down(filtered.double()).square().mean().float()


@pytest.mark.parametrize("zero", ["", "zero 3 over dp\n"])
def test_the_peak_of_complex_and_wide_values_is_the_one_that_is_measured(zero: str) -> None:
    check(Filter(), f"mesh dp=2\ndata x over dp\nprecision fp16\n{zero}", (torch.randn(8, 16),))


class Shifted(nn.Module):
    """Constants of which each rank uses a part, and an input of which all ranks use the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.shift = nn.Linear(16, 32), torch.randn(64, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.up(x + self.shift + y).square().mean()


@pytest.mark.parametrize("micro", ["", "accumulate 4\n"])
def test_the_batch_and_constants_count_once(micro: str) -> None:
    example = (torch.randn(64, 16), torch.randn(16))
    check(Shifted(), f"mesh dp=2\ndata x over dp\n{micro}", example)


class Stack(nn.Module):
    """Blocks of one weight each."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.square().mean()


@pytest.mark.parametrize(("level", "whole"), [(1, 2), (2, 1), (3, 0)])
def test_a_rank_holds_whole_only_what_the_level_leaves_whole(level: int, whole: int) -> None:
    plan = meshwright.Plan.parse(f"mesh dp=4\ndata x over dp\nzero {level} over dp\naccumulate 2\n")
    x, block = torch.randn(8, 64), 64 * 64 * 4
    held: list[Tensor] = []
    for depth in (8, 12):
        program = meshwright.compile(Stack(depth), plan, (x,))
        memory = program.memory()
        sizes = torch.tensor([memory.peak, measured(program, (x,), 0, ADAMW)])
        found = (sizes - memory.optimizer) / block
        assert memory.parameters == memory.gradients == depth * block / 4
        held.append(found)
        # Besides shards of weights, gradients and their sums: two weights, two gradients and what
        # arrives of one.
        assert level < 3 or found.max() - 3 * depth / 4 < 4.5
    # What each further block adds: shards of weight, gradient and its sum, and what is whole.
    for added in (held[1] - held[0]) / 4:
        assert whole + 0.5 <= added <= whole + 0.75


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.first(x)).relu(), 2)
        x = F.dropout(self.second(x).relu(), 0.1).mean((2, 3))
        return F.cross_entropy(self.head(x), y)


class Strides(nn.Module):
    """Copies that a reshape makes, a change of type, and attention with dropout and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.zeros(16, 16))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, self.bias, dropout_p=0.1)
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        return F.mse_loss(self.out(mixed).double().cumsum(1).float(), y)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Convolutions, lambda: (torch.randn(4, 3, 12, 12), torch.randint(0, 5, (4,)))),
        (Strides, lambda: (torch.randn(4, 16, 32), torch.randn(4, 16, 32))),
    ],
)
def test_temporaries_and_copies_are_part_of_the_peak(
    model: Callable[[], nn.Module], example: Callable[[], Any]
) -> None:
    check(model(), "mesh dp=2\ndata x, y over dp\n", example())


def hugging_face(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 128, (4, 16))
    example = {"input_ids": tokens, "labels": tokens.clone()}
    if name in ("bert", "t5"):
        from tests import test_equivalence_huggingface as models

        return getattr(models, name)(), example
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "use_cache": False}
    config = getattr(transformers, f"{name}Config")(
        **sizes, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128
    )
    return getattr(transformers, f"{name}ForCausalLM")(config), example


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "bert", "t5"])
@pytest.mark.parametrize("plan", ["", "accumulate 2\nzero 3 over dp\nprecision bf16 reduce=bf16\n"])
def test_the_peak_of_a_hugging_face_model_is_the_one_that_is_measured(name: str, plan: str) -> None:
    model, example = hugging_face(name)
    check(model, "mesh dp=2\ndata input_ids, labels over dp\n" + plan, example)


def test_every_saved_value_is_free_after_the_backward() -> None:
    plan = meshwright.Plan.parse("mesh dp=2\n" + GPT_DATA)
    program = meshwright.compile(Gpt(layers=4), plan, batch())
    (walk,) = walks(program)
    loss = 2 * 4
    assert walk.most_saved == sum(walk.saved.values()) > 50_000
    assert walk.tally.marks[-1].alive <= 2 * loss
    backward = list(program.graphs().values())[-1]
    taken = [node for node in backward.nodes if node.op == SAVED]
    assert len(taken) == len(walk.saved)
    assert all(node.op != INPUT for node in walk.saved)


class Deep(nn.Module):
    def __init__(self, layers: int, d: int) -> None:
        super().__init__()
        ups = (
            nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
            for _ in range(layers)
        )
        self.layers = nn.ModuleList(ups)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def blocks_in_use(layers: int, d: int, plan: str) -> tuple[float, float]:
    """In sizes of a block: what a step saves, and what it holds at its peak besides that, the
    shards, their gradients and their state."""
    model = Deep(layers, d)
    whole = "mesh dp=4\ndata x over dp\n" + plan
    memory = meshwright.compile(model, meshwright.Plan.parse(whole), torch.randn(8, d)).memory()
    size = sum(p.numel() for p in model.parameters()) * 4
    assert 4 * memory.parameters == 4 * memory.gradients == size
    assert 2 * memory.optimizer == pytest.approx(size, rel=0.01)
    lasting = memory.parameters + memory.gradients + memory.optimizer + memory.activations
    return memory.activations / size * layers, (memory.peak - lasting) / size * layers


@pytest.mark.parametrize("micro", ["", "accumulate 2\n"])
@pytest.mark.parametrize(("d", "most"), [(32, 5.7), (256, 3.9)])
def test_zero_three_holds_a_few_blocks_however_deep_the_model(
    d: int, most: float, micro: str
) -> None:
    # Of small weights, each transfer is packed at one end: two gathers and two reductions.
    few, deep = (blocks_in_use(n, d, f"zero 3 over dp\n{micro}")[1] for n in (5, 10))
    assert deep == pytest.approx(few, abs=0.01)
    assert deep < most


def test_zero_two_holds_whole_weights_and_no_whole_gradients() -> None:
    saved, in_use = blocks_in_use(10, 32, "zero 2 over dp\naccumulate 2\n")
    assert 10 < saved < 11
    assert in_use < 3.5
    # Level 1 adds up whole gradients, which are reduced once.
    saved, in_use = blocks_in_use(10, 32, "zero 1 over dp\naccumulate 2\n")
    assert 20 < saved < 21


STAGED = {
    "1f1b": "stages at blocks.1 over pp microbatches=4",
    "four": "stages at blocks.1, blocks.2, blocks.3 over pp microbatches=4",
    "gpipe": "stages at blocks.2 over pp schedule=gpipe microbatches=4",
    "dualpipe": "stages at blocks.2 over pp schedule=dualpipe microbatches=4",
    "whole batch": "stages at blocks.2 over pp",
    **{
        name: f"stages at blocks.1, blocks.2, blocks.3 over pp schedule={name} virtual=2 "
        "microbatches=4"
        for name in ("interleaved", "zbv", "zb")
    },
}


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param("1f1b", f"mesh pp=2, dp=2\n{GPT_DATA}zero 2 over dp\n", marks=SLOW),
        ("1f1b", f"mesh pp=2, dp=2\n{GPT_DATA}zero 3 over dp\n"),
        ("four", "mesh pp=4\ndata tokens, targets\n"),
        pytest.param("four", f"mesh pp=4, tp=2\ndata tokens, targets\n{GPT_TENSOR}", marks=SLOW),
        ("gpipe", "mesh pp=2\ndata tokens, targets\n"),
        pytest.param("dualpipe", "mesh pp=2\ndata tokens, targets\n", marks=SLOW),
        ("whole batch", f"mesh pp=2, dp=2\n{GPT_DATA}"),
        pytest.param("interleaved", f"mesh pp=2, dp=2\n{GPT_DATA}zero 1 over dp\n", marks=SLOW),
        ("interleaved", f"mesh pp=2, dp=2\n{GPT_DATA}precision bf16\nzero 3 over dp\n"),
        ("dualpipe", f"mesh pp=2, dp=2\n{GPT_DATA}"),
        pytest.param("zbv", f"mesh pp=2, tp=2\ndata tokens, targets\n{GPT_TENSOR}", marks=SLOW),
        ("zb", "mesh pp=2\ndata tokens, targets\nprecision bf16\n"),
        ("1f1b", f"mesh pp=2, dp=2\n{GPT_DATA}zero 3 over dp\ncheckpoint blocks.*\n"),
        ("zbv", f"mesh pp=2, tp=2\ndata tokens, targets\n{GPT_TENSOR}checkpoint blocks.*\n"),
        ("dualpipe", "mesh pp=2\ndata tokens, targets\ncheckpoint blocks.* segments=2\n"),
        ("zb", "mesh pp=2\ndata tokens, targets\noffload activations\n"),
        ("dualpipe", "mesh pp=2\ndata tokens, targets\noffload activations blocks.*\n"),
        ("interleaved", f"mesh pp=2, dp=2\n{GPT_DATA}zero 3 over dp\noffload activations\n"),
        ("zbv", "mesh pp=2\ndata tokens, targets\ncheckpoint blocks.*\noffload activations\n"),
    ],
)
def test_the_peak_of_every_stage_is_the_one_that_is_measured(name: str, plan: str) -> None:
    check(Gpt(layers=4), f"{plan}{STAGED[name]}\n", tokens())


@pytest.mark.slow
def test_large_buckets_of_stages_have_memory_from_where_they_are_first_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aliasing, "ALLOCATED_BYTES", 1)
    check(Gpt(layers=4), f"mesh pp=4\ndata tokens, targets\n{STAGED['four']}\n", tokens())
    plan = f"mesh pp=2, dp=2\n{GPT_DATA}{STAGED['zbv']}\nzero 2 over dp\n"
    check(Gpt(layers=4), plan, tokens())


@pytest.mark.slow
@pytest.mark.parametrize(
    "zero", ["", pytest.param("zero 2 over dp\n", marks=SLOW), "zero 3 over dp\n"]
)
@pytest.mark.parametrize(
    ("name", "taken"), [("1f1b", {"pp=0": 1, "pp=1": 1}), ("zbv", {"pp=0": 2, "pp=1": 0})]
)
def test_memory_does_not_grow_with_the_number_of_microbatches(
    name: str, taken: dict[str, int], zero: str
) -> None:
    """Apart from the batch: `taken` says how many of the two inputs the ranks of a place take."""
    found: list[dict[str, tuple[int, int]]] = []
    for number in (4, 8, 16):
        example = torch.randint(48, (4 * number, 8)), torch.randint(48, (4 * number, 8))
        staged = STAGED[name].replace("=4", f"={number}")
        plan = meshwright.Plan.parse(f"mesh pp=2, dp=2\n{GPT_DATA}{staged}\n{zero}")
        memories = meshwright.compile(Gpt(layers=4), plan, example).memories()
        batch = {place: count * example[0].nbytes // 2 for place, count in taken.items()}
        found.append({k: (each.activations, each.peak - batch[k]) for k, each in memories.items()})
    assert found[1] == found[2]
    assert name == "zbv" or found[0] == found[1]

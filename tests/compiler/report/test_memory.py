"""Memory: what is predicted of a step is what a step needs, rank by rank, to the byte.

Measured is each storage that an operator of a rank makes on the virtual mesh, while it lives. What
an exchange was lent, and the memory of its result, count from its start to its wait, as among
processes: the virtual mesh makes the result when the last rank has started.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright.compiler.graph import aliasing
from meshwright.compiler.graph.ir import INPUT, SAVED
from meshwright.compiler.kernels import hashing
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Start, Wait
from meshwright.compiler.report.counter import StorageCounter, address
from meshwright.compiler.report.memory import walks
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens
from tests.passes.test_loops import PLANS


class RankCounter(StorageCounter):
    """Counts storages by the rank that made them or received them."""

    def __init__(self) -> None:
        super().__init__()
        self.rank: int | None = None
        self.owners: dict[int, int | None] = {}
        self.peaks: dict[int, int] = {}
        self.under_way: dict[Any, tuple[int, Tensor, int]] = {}
        """By handle: the rank of an exchange, what it was lent, and the bytes of its result."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.alive()
        before = set(self.made)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.owners.update(dict.fromkeys(self.made.keys() - before, self.rank))
        self.note()
        return result

    def note(self) -> None:
        """Compare what the rank that runs holds with the most that it held."""
        if self.rank is not None:
            self.alive()
            held = sum(n for key, (_, n) in self.made.items() if self.owners[key] == self.rank)
            held += sum(size for rank, _, size in self.under_way.values() if rank == self.rank)
            self.peaks[self.rank] = max(held, self.peaks.get(self.rank, 0))

    def run(
        self, program: Generator[Any, Any, Any], rank: int, mesh: Mesh
    ) -> Generator[Any, Any, Any]:
        """The same program, known by its rank while it runs."""
        answer: Any = None
        while True:
            self.rank = rank
            try:
                request, answer = program.send(answer), None
            except StopIteration as stop:
                return stop.value
            finally:
                self.rank = None
            answer = yield request
            if isinstance(request, Start):
                self.under_way[answer] = (rank, request.tensor, result_bytes(request, mesh))
            elif isinstance(request, Wait):
                del self.under_way[request.handle]
            if isinstance(answer, Tensor) and address(answer) in self.made:
                self.owners[address(answer)] = rank
            self.rank = rank
            self.note()
            del request


def result_bytes(start: Start, mesh: Mesh) -> int:
    """The memory of a result of its own."""
    num_bytes, size = start.tensor.nbytes, mesh.size(start.wire.axes)
    if start.donate and start.wire.kind == "all_reduce":
        return 0
    sizes = {"all_gather": num_bytes * size, "reduce_scatter": num_bytes // size, "transfer": 0}
    return sizes.get(start.wire.kind, num_bytes)


def measured(program: meshwright.Program, example: Any) -> list[int]:
    """The most bytes that each rank of the virtual mesh holds in its first step, which makes tables
    of random numbers; without an optimizer's."""
    run = program.launch(check_inputs=False)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    hashing._cached_tables.cache_clear()
    counter, transport = RankCounter(), run.transport.run
    run.transport.run = lambda programs, names=(): transport(
        [counter.run(each, rank, program.mesh) for rank, each in enumerate(programs)], names
    )
    with counter:
        run.step(*args, **kwargs)
    linked = run._programs.launched
    inputs = linked.inputs.flatten(args, kwargs, "")
    found = []
    for rank, (state, (executor, sharders)) in enumerate(
        zip(run.states, linked.ranks, strict=True)
    ):
        lasting_buffers = [state._buckets[key].flat for key in state._lasting]
        held = [*state.tensors.values(), *lasting_buffers, *executor.constants.values()]
        lasting = {address(tensor): tensor.untyped_storage().nbytes() for tensor in held}
        batch = sum(own(each).nbytes for own, each in zip(sharders, inputs, strict=True))
        found.append(sum(lasting.values()) + batch + counter.peaks[rank])
    return found


def check(model: nn.Module, plan: str, example: Any) -> None:
    """The peak of each rank, and of those that hold parts of the same the highest."""
    program = meshwright.compile(model.train(), meshwright.Plan.parse(plan), example)
    found: dict[str, int] = {}
    for rank, size in enumerate(measured(program, example)):
        place = program.place(rank)
        found[place] = max(size, found.get(place, 0))
    memories = program.memories().items()
    assert found == {place: each.peak - each.optimizer for place, each in memories}


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


@pytest.mark.parametrize("name", ["data", "micro alone", "sequence"])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_the_peak_of_microbatches_is_the_one_that_is_measured(name: str, level: int) -> None:
    zero = f"zero {level} over dp\n" if level and name != "micro alone" else ""
    check(Gpt(p=0.1), PLANS[name] + zero, tokens())
    if zero:
        check(Gpt(p=0.1), re.sub("accumulate.*\n", "", PLANS[name] + zero), tokens())


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
        found = torch.tensor([memory.peak - memory.optimizer, max(measured(program, (x,)))]) / block
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
    assert walk.alive <= 2 * loss
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
    assert 4 * memory.parameters == 4 * memory.gradients == 2 * memory.optimizer == size
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
        ("1f1b", f"mesh pp=2, dp=2\n{GPT_DATA}zero 2 over dp\n"),
        ("1f1b", f"mesh pp=2, dp=2\n{GPT_DATA}zero 3 over dp\n"),
        ("four", "mesh pp=4\ndata tokens, targets\n"),
        ("four", f"mesh pp=4, tp=2\ndata tokens, targets\n{GPT_TENSOR}"),
        ("gpipe", "mesh pp=2\ndata tokens, targets\n"),
        ("dualpipe", "mesh pp=2\ndata tokens, targets\n"),
        ("whole batch", f"mesh pp=2, dp=2\n{GPT_DATA}"),
        ("interleaved", f"mesh pp=2, dp=2\n{GPT_DATA}zero 1 over dp\n"),
        ("zbv", f"mesh pp=2, tp=2\ndata tokens, targets\n{GPT_TENSOR}"),
        ("zb", "mesh pp=2\ndata tokens, targets\nprecision bf16\n"),
    ],
)
def test_the_peak_of_every_stage_is_the_one_that_is_measured(name: str, plan: str) -> None:
    check(Gpt(layers=4), f"{plan}{STAGED[name]}\n", tokens())


def test_large_buckets_of_stages_have_memory_from_where_they_are_first_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aliasing, "ALLOCATED_BYTES", 1)
    check(Gpt(layers=4), f"mesh pp=4\ndata tokens, targets\n{STAGED['four']}\n", tokens())
    plan = f"mesh pp=2, dp=2\n{GPT_DATA}{STAGED['zbv']}\nzero 2 over dp\n"
    check(Gpt(layers=4), plan, tokens())


@pytest.mark.parametrize("zero", ["", "zero 2 over dp\n", "zero 3 over dp\n"])
@pytest.mark.parametrize("name", ["1f1b", "zbv"])
def test_memory_does_not_grow_with_the_number_of_microbatches(name: str, zero: str) -> None:
    found: list[dict[str, tuple[int, int]]] = []
    for number in (4, 8, 16):
        example = torch.randint(48, (4 * number, 8)), torch.randint(48, (4 * number, 8))
        staged = STAGED[name].replace("=4", f"={number}")
        plan = meshwright.Plan.parse(f"mesh pp=2, dp=2\n{GPT_DATA}{staged}\n{zero}")
        memories = meshwright.compile(Gpt(layers=4), plan, example).memories()
        batch = sum(each.nbytes for each in example) // 2
        found.append({k: (each.activations, each.peak - batch) for k, each in memories.items()})
    assert found[1] == found[2]
    assert name == "zbv" or found[0] == found[1]

"""The pass `zero`: parameters are stored split over ranks that use them whole."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright
from meshwright import PlanError
from meshwright.compiler.codegen.instructions import Call, Exchange, Instructions, Start, Wait
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.graph.transfers import moves
from meshwright.compiler.public import Program
from meshwright.compiler.report.summary import summarise
from meshwright.passes import driver, fuse
from meshwright.passes.statements import zero
from meshwright.runtime.machine import RUNTIME
from tests.equivalence import check_equal, implicit_gathers
from tests.models import (
    GPT_DATA,
    GPT_TENSOR,
    UNEVEN,
    Gpt,
    Indivisible,
    Mlp,
    Uneven,
    real,
    rows,
    tokens,
)
from tests.passes import examples
from tests.passes.stages import check_documented, shown, stages
from tests.test_equivalence_huggingface import gpt2, llama

DATA = "mesh dp=4\n" + GPT_DATA
TENSOR = "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR


def compiled(model: nn.Module, example: tuple[Tensor, ...], plan: str) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), example=example)


def gathered_again(program: Program) -> set[str]:
    """The modules whose parameters the backward gathers."""
    nodes = program.stages[0].graphs[Phase.BACKWARD].nodes
    gathers = [node for node in nodes if moves(node) and "all_gather" in str(node.op)]
    names = {operand.args[1] for node in gathers for operand in node.args if operand.held}
    return {name.rpartition(".")[0] for name in names}


def test_the_docstring_shows_a_linear_before_and_after() -> None:
    plan = "mesh dp=2\ndata x over dp\nzero 3 over dp\n"
    before, after = (
        stages(examples.Mlp(), (torch.randn(8, 16),), each)["partition"]
        for each in (plan.replace("zero 3 over dp\n", ""), plan)
    )
    names = "up_weight", "vary", "linear"
    check_documented(
        zero,
        shown(before, *names),
        shown(after, "up_weight", "all_gather_replicated", "vary", "linear"),
    )


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(
    "plan",
    [
        DATA,
        DATA + "accumulate 2\n",
        TENSOR,
        TENSOR + "sequence blocks.* over tp\nvocab wte, head over tp\naccumulate 4\n",
        "mesh a=2, b=2\ndata tokens, targets over (a, b)\naccumulate 2\n",
    ],
    ids=["data", "accumulated", "tensor", "sequence", "two axes"],
)
def test_a_gpt_trains_as_on_one_device(plan: str, level: int) -> None:
    torch.manual_seed(0)
    over = "(a, b)" if "a=2" in plan else "dp"
    program = check_equal(Gpt(layers=1), tokens, f"{plan}zero {level} over {over}\n")
    assert implicit_gathers(program) == []
    for name, stored in program.parameters.items():
        assert set(stored.layout.split_axes) > set(stored.used.split_axes), name


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a tied weight, a scalar and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.again = nn.Linear(7, 5), nn.Linear(5, 7), nn.Linear(7, 5)
        self.again.weight = self.up.weight
        self.shift = nn.Parameter(torch.rand(()))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.tanh(self.up(x)) * self.frozen)
        return self.again(y + self.shift).square().mean()


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("micro", ["", "accumulate 3\n"])
def test_what_does_not_divide_is_stored_with_zeros(level: int, micro: str) -> None:
    torch.manual_seed(0)
    plan = f"mesh dp=4\ndata x over dp\nzero {level} over dp\n{micro}"
    program = check_equal(Odd(), lambda: (real(12, 7),), plan)
    stored = program.parameters
    assert str(stored["up.weight"].layout) == "[5, 8@dp]"
    assert stored["shift"].layout.split_axes == ()
    assert stored["frozen"].layout.split_axes == (("dp",) if level == 3 else ())


class Switched(nn.Module):
    """Another layer in evaluation than in training; one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen = nn.Linear(16, 7), nn.Linear(7, 7).requires_grad_(False)
        self.training_only, self.evaluation_only = nn.Linear(7, 3), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        last = self.training_only if self.training else self.evaluation_only
        return last(self.frozen(self.first(x))).square().mean()


@pytest.mark.parametrize("level", [1, 2, 3])
def test_evaluation_takes_the_weights_as_training_stores_them(level: int) -> None:
    model = Switched().double()
    program = compiled(model, rows(), f"mesh dp=2\ndata x over dp\nzero {level} over dp\n")
    run = program.launch()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    run.step(*rows())
    optimizer.step()
    run.copy_to(model)
    x = real(4, 16)
    for found in (run.evaluate(x), run.forward(x)):
        torch.testing.assert_close(found, model.eval()(x).detach())


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("plan", ["mesh dp=4, tp=2\n", "mesh dp=3, tp=2\naccumulate 2\n"])
def test_zeros_stand_at_the_end_of_each_part_that_ranks_use(plan: str, level: int) -> None:
    torch.manual_seed(0)
    plan = f"{plan}{GPT_DATA}{UNEVEN}zero {level} over dp\n"
    program = check_equal(Uneven(), lambda: tokens(11, 12, 4), plan)
    for name, stored in program.parameters.items():
        assert ("dp" in stored.layout.split_axes) == (name != "scale"), name


def test_a_part_that_does_not_divide_is_stored_longer_and_shown_so() -> None:
    program = compiled(
        Uneven(), tokens(11, 12, 4), f"mesh dp=4, tp=2\n{GPT_DATA}{UNEVEN}zero 3 over dp\n"
    )
    layouts = {name: str(each.layout) for name, each in program.parameters.items()}
    assert layouts["up.bias"] == "[72@(tp, dp)]"
    assert layouts["fused.bias"] == "[(8@(tp, dp) | 16@(tp, dp))]"
    assert layouts["head.bias"] == "[16@(tp, dp)]"
    assert layouts["wte.weight"] == "[12@tp, 8@dp]"
    value = torch.arange(66.0) + 1
    stored = program.parameters["up.bias"]
    assert (stored.padded(value).view(2, 36)[:, 33:] == 0).all()
    assert torch.equal(stored.unpadded(stored.padded(value)), value)
    notes = {held.note for held in summarise(program).held}
    assert {"66 padded to 72", "11 padded to 12, 7 padded to 8"} <= notes


def test_statements_about_modules_leave_the_others_alone() -> None:
    torch.manual_seed(0)
    plan = (
        DATA + "zero 3 blocks.* over dp\nzero 1 blocks.1.{up,down} over dp\nzero 2 **.qkv over dp\n"
    )
    program = check_equal(Gpt(), tokens, plan)
    stored = program.parameters
    assert stored["wte.weight"].layout.split_axes == ()
    assert stored["blocks.0.ln1.weight"].layout.split_axes == ("dp",)
    gathered = gathered_again(program)

    assert {"blocks.0.down", "blocks.1.proj"} <= gathered
    assert not any(name in ("blocks.1.up", "blocks.1.down") or "qkv" in name for name in gathered)


def test_the_innermost_statement_around_a_parameter_holds() -> None:
    plan = DATA + "zero 1 over dp\nzero 3 blocks.0 over dp\n"
    program = compiled(Gpt(), tokens(), plan)
    again = gathered_again(program)
    assert "blocks.0.proj" in again
    assert "blocks.1.proj" not in again


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).square().mean()


@pytest.mark.parametrize(
    ("name", "model", "plan"),
    [
        ("zero-two-of-one-tensor", Tied, "zero 1 first over dp\nzero 3 second over dp\n"),
        ("zero-no-such-module", Mlp, "zero 3 blocks.* over dp\n"),
        ("zero-two-for-all", Mlp, "zero 1 over dp\nzero 3 over dp\n"),
    ],
)
def test_mistakes_are_explained(
    name: str, model: type[nn.Module], plan: str, golden: Callable[[str, str], None]
) -> None:
    x = rows()[0] if model is Mlp else torch.randn(8, 8)
    with pytest.raises(PlanError) as caught:
        compiled(model(), (x,), "mesh dp=2\ndata x over dp\n" + plan)
    golden(name, str(caught.value))


BATCH = {"input_ids": torch.zeros(16, 8, dtype=torch.int64)}
BATCH["labels"] = BATCH["input_ids"]


@dataclass(frozen=True)
class Sent:
    """A model, and what a step sends of it under `zero 3` besides two gathers and a scatter of
    each of its `groups` of weights in every microbatch."""

    make: Callable[[], nn.Module]
    example: Any
    inputs: str
    groups: int
    forward_only: str
    """What the backward takes nothing of: tables, biases and the first weight."""
    num_forward_only: int
    once: str = "no parameter"
    """What no microbatch changes: its forward runs once, before all of them."""
    padding: int = 0
    """The zeros that storage adds, in elements."""


SENT: dict[str, Sent] = {
    "llama": Sent(
        lambda: llama(kv=2), BATCH, "input_ids, labels", 5, r"model.embed_tokens.*", 1
    ),
    # The last norm is in no block: its weight and its bias are groups of their own.
    "tied gpt2": Sent(
        gpt2, BATCH, "input_ids, labels", 6, r".*(\.bias|wpe\.weight)", 2, r".*wpe.*"
    ),
    "indivisible": Sent(
        Indivisible, (torch.zeros(16, 10),), "x", 2, "up.weight", 1, padding=24
    ),
}  # fmt: skip


@pytest.mark.parametrize("mesh", ["dp=4", "a=2, b=2"])
@pytest.mark.parametrize("name", SENT)
def test_a_step_sends_what_the_papers_say(name: str, mesh: str) -> None:
    case, over = SENT[name], "dp" if mesh == "dp=4" else "(a, b)"
    model = case.make()
    source = driver.capture(model, case.example)
    for level, m in itertools.product((1, 2, 3), (1, 2, 4) if mesh == "dp=4" else (2,)):
        plan = f"mesh {mesh}\ndata {case.inputs} over {over}\nzero {level} over {over}\n"
        plan += f"accumulate {m}\n" if m > 1 else ""
        program = driver.compile_captured(source, meshwright.Plan.parse(plan), runtime=RUNTIME)

        def volume(pattern: str, program: Program = program) -> int:
            """The bytes that a rank sends to gather these parameters once, or to scatter them."""
            stored = {n: s for n, s in program.parameters.items() if re.fullmatch(pattern, n)}
            shards = [math.prod(s.layout.local_shape(program.mesh)) for s in stored.values()]
            return 3 * 4 * sum(shards)

        whole = volume(".*")
        numel = sum(parameter.numel() for parameter in model.parameters())
        assert whole == 3 * (numel + case.padding)  # three of four shards, four bytes each
        sent, times = Counter[str](), Counter[str]()
        for each in program.comm():
            sent[each.kind] += each.bytes * each.times
            times[each.kind] += each.times
        gathers, gathered = case.groups, whole
        if level == 3:
            hoisted = (m - 1) * bool(volume(case.once))
            gathers = m * (2 * case.groups - case.num_forward_only) - hoisted
            gathered = m * (2 * whole - volume(case.forward_only)) - (m - 1) * volume(case.once)
        assert (times["all_gather"], sent["all_gather"]) == (gathers, gathered)
        scatters = 1 if level == 1 else m
        assert times["reduce_scatter"] == scatters * case.groups
        assert sent["reduce_scatter"] == scatters * whole
        # Besides, labels are counted and the loss is summed up.
        assert set(sent) <= {"all_gather", "reduce_scatter", "all_reduce"}
        assert sent["all_reduce"] <= 32


class Stack(nn.Module):
    """Blocks of one weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x.square().mean()


def products_during(instructions: Instructions, kind: str) -> list[int]:
    """For each collective of a kind: how many products are computed while it is under way."""
    under_way: dict[Exchange, int] = {}
    found = []
    for each in instructions.body:
        if isinstance(each, Start) and each.exchange.wire.kind == kind:
            under_way[each.exchange] = 0
        elif isinstance(each, Wait) and each.exchange in under_way:
            found.append(under_way.pop(each.exchange))
        elif isinstance(each, Exchange) and each.wire.kind == kind:
            found.append(0)
        elif isinstance(each, Call) and re.match("linear|matmul|mm|addmm", each.node.name):
            under_way = {exchange: count + 1 for exchange, count in under_way.items()}
    return found + list(under_way.values())  # those that only a later graph waits for


@pytest.mark.parametrize("precision", ["", "precision bf16 reduce=bf16\n"])
@pytest.mark.parametrize("micro", ["", "accumulate 2\n"])
def test_weights_arrive_and_gradients_leave_while_other_blocks_compute(
    micro: str, precision: str
) -> None:
    plan = "mesh dp=2\ndata x over dp\nzero 3 over dp\n" + precision + micro
    program = compiled(Stack(), (torch.randn(8, 16),), plan)
    found = {each.name: each for each in program.instructions}
    forward, backward = found["stage0.forward"], found["stage0.backward"]
    # Only the first is waited for; each other is under way during the block before it.
    assert products_during(forward, "all_gather") == [0, 1, 1, 1, 1]
    # The backward of a block has two products, that of the first only one.
    first, *others = products_during(backward, "all_gather")
    assert first == 0 and all(count == 2 for count in others)
    last, *others = sorted(products_during(backward, "reduce_scatter"))
    assert last == 0 and len(others) == 4 and all(others)


class Late(nn.Module):
    """The last gradients that its backward makes are those of a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.blocks = nn.ModuleList([examples.Body()])

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.blocks[0](self.wte(tokens)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_a_bucket_is_reduced_once_each_of_its_parts_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients too large to travel together are scattered into it one by one."""
    monkeypatch.setattr(fuse, "SMALL_BYTES", 0)
    torch.manual_seed(0)
    plan = "mesh dp=2, tp=2\n" + GPT_DATA + "columns blocks.*.up over tp\n"
    plan += "rows blocks.*.down over tp\nvocab wte, head over tp\nsequence blocks.* over tp\n"
    check_equal(Late(), lambda: tokens(vocab=32), plan + "zero 1 over dp\n")


class Added(nn.Module):
    """Two weights with one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ (self.a + self.b)).square().mean()


def test_one_scatter_for_two_parameters_is_in_their_bucket_before_that_is_reduced() -> None:
    torch.manual_seed(0)
    plan = "mesh dp=2, cp=2\ndata x over (dp, cp)\nzero 1 over dp\n"
    check_equal(Added(), lambda: (torch.randn(8, 16, dtype=torch.float64),), plan)

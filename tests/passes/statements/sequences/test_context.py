"""The pass `context`: sequences are split over ranks, attention included."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright import PlanError
from meshwright.compiler.composites import ring_attention
from meshwright.compiler.composites.ring_attention import Ring, RingAttention
from meshwright.compiler.kernels import ring
from meshwright.compiler.kernels.ring import Part, Tile, tiles
from meshwright.compiler.report.show import show_text
from meshwright.passes.statements.sequences import attention, context, zigzag
from tests.equivalence import check_equal, implicit_gathers
from tests.models import GPT_TENSOR, Gpt, real, tokens
from tests.passes.stages import check_documented, shown, stages

BATCH, LENGTH, HEADS, GROUPS, WIDTH = 4, 16, 8, 2, 6
METHODS = "ring", "ulysses"


def context_of(method: str, ranks: int, selector: str = "blocks.*") -> str:
    return f"mesh cp={ranks}\ncontext {selector} over cp method={method}\n"


def test_the_docstring_shows_what_enters_before_and_after() -> None:
    found = stages(Gpt(), tokens(), context_of("ring order=contiguous", 2))
    names = "add", "attention"
    check_documented(context, shown(found["normalise"], *names), shown(found["partition"], *names))


def test_the_docstring_shows_a_ring_before_and_after_it_is_lowered() -> None:
    found = stages(Gpt(), tokens(), context_of("ring order=contiguous", 2))
    steps = "permute_1", "permute_2", "ring_step", "ring_step_1"
    check_documented(
        ring_attention, shown(found["partition"], "attention"), shown(found["lower"], *steps)
    )


def test_the_docstring_shows_attention_by_head_before_and_after() -> None:
    found = stages(Gpt(), tokens(), context_of("ulysses", 2))
    names = "attention", "getitem_1"
    moves = "all_to_all", "all_to_all_3"
    check_documented(
        attention, shown(found["normalise"], *names), shown(found["partition"], *names, *moves)
    )


def test_the_docstring_shows_zigzag_order_before_and_after() -> None:
    before = stages(Gpt(), tokens(), context_of("ring order=contiguous", 2))["context"]
    after = stages(Gpt(), tokens(), context_of("ring", 2))["context"]
    names = "embedding", "attention"
    check_documented(zigzag, shown(before, *names), shown(after, "index_select", *names))


class Grouped(nn.Module):
    """A layer of attention with fewer heads of keys than of queries."""

    def __init__(self, groups: int = GROUPS) -> None:
        super().__init__()
        self.sizes = (HEADS, groups, groups)
        self.qkv = nn.Linear(WIDTH, sum(self.sizes) * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2).split(self.sizes, 1)
        y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, groups: int = GROUPS) -> None:
        super().__init__()
        self.wte, self.attn = nn.Embedding(32, WIDTH), Grouped(groups)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attn(self.wte(tokens)).square().mean()


def example(length: int = LENGTH) -> tuple[Tensor]:
    return (torch.randint(0, 32, (BATCH, length)),)


def compiled(
    model: nn.Module, plan: str, batch: tuple[Tensor, ...] | None = None
) -> meshwright.Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), batch or example())


def sent(program: meshwright.Program) -> dict[str, float]:
    """Elements of float32 that a rank sends for attention, by phase."""
    found = Counter[str]()
    for each in program.comm().moved:
        if each.kind != "all_reduce":
            found[each.phase] += each.bytes * each.times // 4
    return dict(found)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_ring_sends_what_the_formulas_say(ranks: int) -> None:
    program = compiled(Model(), context_of("ring", ranks, "attn"))
    block = 2 * BATCH * LENGTH // ranks * GROUPS * WIDTH
    assert sent(program) == {"forward": (ranks - 1) * block, "backward": (2 * ranks - 1) * block}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ulysses_sends_what_the_formulas_say(ranks: int) -> None:
    program = compiled(Model(), context_of("ulysses", ranks, "attn"))
    heads = 2 * HEADS + 2 * max(GROUPS, ranks)
    each = (ranks - 1) * BATCH * LENGTH // ranks * heads * WIDTH // ranks
    assert sent(program) == {"forward": each, "backward": each}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_rank_holds_of_activations_falls_with_the_number_of_ranks(method: str) -> None:
    def held(ranks: int) -> int:
        program = compiled(Gpt(layers=4), context_of(method, ranks), tokens(batch=16))
        return program.memory().activations

    whole = compiled(Gpt(layers=4), "mesh x=1\n", tokens(batch=16)).memory().activations
    for ranks in (2, 4):
        assert held(ranks) == pytest.approx(whole / ranks, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("selector", ["blocks.*", '""', "blocks.0, blocks.1"])
def test_no_activation_is_gathered(method: str, selector: str) -> None:
    program = compiled(Gpt(), context_of(method, 2, selector), tokens())
    assert implicit_gathers(program) == []
    kinds = {each.kind for each in program.comm().moved}
    assert kinds == {"all_reduce", "permute" if method == "ring" else "all_to_all"}


def test_the_next_block_arrives_while_one_is_computed_and_no_third_is_there() -> None:
    code = compiled(Gpt(layers=1), context_of("ring", 4), tokens()).code[0].source
    # What starts and is awaited, between the steps.
    lines = re.findall(r"(_ring_step|yield _Start|yield _Wait|yield)", code[: code.index("_gelu")])
    short = {"_ring_step": "C", "yield _Start": "s", "yield _Wait": "w", "yield": "x"}
    assert "".join(short[line] for line in lines) == "ssCwswsCwswsCwwC"


def test_sequence_parallelism_splits_what_each_rank_has_of_a_sequence() -> None:
    plan = context_of("ring", 2).replace("cp=2", "cp=2, tp=2") + GPT_TENSOR
    program = compiled(Gpt(layers=1), plan + "sequence blocks.* over tp\n", tokens())
    (add,) = [n for n in program.stages[0].forward.nodes if n.name == "add_1"]
    assert str(add.layout) == "[8, 8@(cp, tp), 24]"


def refused(plan: str, model: nn.Module, batch: tuple[Tensor, ...]) -> str:
    with pytest.raises(PlanError) as caught:
        compiled(model, plan, batch)
    return str(caught.value)


class Windows(nn.Module):
    """Attention under a mask that is known but for the padding."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.wte, self.qkv, self.mask = nn.Embedding(32, 6), nn.Linear(6, 18), mask

    def forward(self, tokens: Tensor) -> Tensor:
        here = torch.arange(tokens.shape[1])
        back = here[:, None] - here
        masks = {
            "window of 5": (back >= 0) & (back < 5),
            "window of 6": (back >= 0) & (back < 6),
            "documents of 6": (back >= 0) & (here[:, None] // 6 == here // 6),
            "padded window": ((back >= 0) & (back < 5))[None, None] & (tokens > 3)[:, None, None],
            "both sides": back.abs() < 5,
            "padding": (tokens > 3)[:, None, None].expand(-1, 1, len(here), -1),
            "not a window": ~((back >= 0) & (back < 5) & (tokens[0] > 3)),
        }
        q, k, v = self.qkv(self.wte(tokens)).chunk(3, -1)
        heads = (x.unflatten(-1, (2, 3)).transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(*heads, attn_mask=masks[self.mask])
        return y.square().mean()


BLOCKS = {"window of 5": 2, "window of 6": 3, "documents of 6": 3, "padded window": 2}


@pytest.mark.parametrize("mask", [*BLOCKS, "both sides", "padding", "not a window"])
def test_a_ring_brings_no_block_that_a_known_mask_hides(mask: str) -> None:
    torch.manual_seed(0)
    plan = 'mesh cp=4\ncontext "" over cp\n'
    program = check_equal(Windows(mask), lambda: (torch.randint(0, 32, (4, 16)),), plan, steps=1)
    (forward, backward) = (Counter[str](), Counter[str]())
    for each in program.comm().moved:
        (forward if each.phase == "forward" else backward)[each.kind] += each.times
    blocks = BLOCKS.get(mask, 4)
    assert (forward["permute"], backward["permute"]) == (2 * (blocks - 1), 2 * (2 * blocks - 1))


@pytest.mark.parametrize(
    ("model", "order", "computed"),
    [
        (Windows("window of 5"), "", 4 + 3),
        (Model(), " order=contiguous", 4 + 3 + 2 + 1),
        (Model(), " order=zigzag", 4 * 4),
    ],
)
def test_a_rank_computes_no_block_that_it_does_not_see(
    model: nn.Module, order: str, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = meshwright.Plan.parse(f'mesh cp=4\ncontext "" over cp{order}\n')
    run = meshwright.compile(model, plan, example(), mode="infer").launch()
    calls, known = list[str](), ring.block_attention

    def counted(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append("block")
        return known(*args, **options)

    monkeypatch.setattr(ring, "block_attention", counted)
    run.forward(*example())
    assert len(calls) == computed


class Last(Gpt):
    """It looks at the last token."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return super().forward(tokens, targets) + self.blocks[0](self.wte(tokens))[:, -1].mean()


class Placed(nn.Embedding):
    """Tokens, and a vector for each position."""

    def __init__(self) -> None:
        super().__init__(48, 24)
        self.place = nn.Parameter(torch.randn(8, 24))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.place


class Mixed(nn.Embedding):
    """Each token with its neighbours."""

    def __init__(self) -> None:
        super().__init__(48, 24)
        self.conv = nn.Conv1d(24, 24, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.conv(super().forward(tokens).mT).mT


def gpt(table: nn.Embedding) -> Gpt:
    model = Gpt()
    model.wte, model.head.weight = table, table.weight
    return model


ORDERS: dict[str, tuple[nn.Module, int, str]] = {
    "parts": (Gpt(), 4, "zigzag"),
    "too few tokens": (Gpt(), 8, "contiguous"),
    "the last token": (Last(), 4, "contiguous"),
    "dropout": (Gpt(p=0.1), 4, "zigzag"),
    "a vector for each position": (gpt(Placed()), 4, "zigzag"),
    "a convolution": (gpt(Mixed()), 4, "contiguous"),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_causal_ring_is_in_zigzag_order_where_nothing_else_depends_on_it(name: str) -> None:
    model, ranks, order = ORDERS[name]
    graph = stages(model, tokens(), context_of("ring", ranks))["context"]
    rings = [node for node in graph.nodes if node.op == RingAttention.op]
    assert {Ring.of(node.args, 4).order for node in rings} == {order}


SHOWN = {
    "parts": "(order=zigzag)",
    "too few tokens": "(order=contiguous: ranks have no two equal parts of 8)",
    "the last token": "(order=contiguous: `select` in the model depends on the order)",
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_order_that_is_chosen_is_shown_with_its_reason(name: str) -> None:
    model, ranks, _ = ORDERS[name]
    text = show_text(compiled(model, context_of("ring", ranks), tokens()), width=200)
    assert f"context blocks.* over cp method=ring {SHOWN[name]}" in text


@pytest.mark.parametrize("method", ["ring order=contiguous", "ulysses"])
def test_nothing_is_noted_where_nothing_was_chosen(method: str) -> None:
    program = compiled(Gpt(), context_of(method, 2), tokens())
    assert not program.notes


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_works_as_much_in_every_step_of_a_zigzag_ring(ranks: int) -> None:
    def pairs(tile: Tile) -> int:
        rows, keys = (each.stop - each.start for each in (tile.rows, tile.keys))
        return rows * (rows + 1) // 2 if tile.is_causal else rows * keys

    part = Part(16 * ranks, ranks, "zigzag")
    for step in range(ranks):
        work = {sum(map(pairs, tiles(part, here, (here - step) % ranks))) for here in range(ranks)}
        assert len(work) == 1


class Across(nn.Module):
    """Causal attention of some tokens to others."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(12, 12), nn.Linear(12, 24)
        self.attend = Attend()

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        return self.attend(self.q(x), *self.kv(others).chunk(2, -1)).square().mean()


class Attend(nn.Module):
    def forward(self, *heads: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (2, 6)).transpose(1, 2) for x in heads)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


REFUSED: dict[str, tuple[str, nn.Module, tuple[Tensor, ...]]] = {
    "context-length": (context_of("ring", 3), Gpt(), tokens()),
    "context-heads": (context_of("ulysses", 8), Gpt(), tokens()),
    "context-zigzag-length": (context_of("ring order=zigzag", 8), Gpt(), tokens()),
    "context-zigzag-order": (context_of("ring order=zigzag", 2), Last(), tokens()),
    "context-and-sequence": (
        context_of("ring", 2) + "sequence blocks.*.up over cp\n",
        Gpt(),
        tokens(),
    ),
    "context-over-heads": (
        context_of("ring", 2) + GPT_TENSOR.replace("tp", "cp"),
        Gpt(),
        tokens(),
    ),
    "context-one-token": (context_of("ulysses", 2), Gpt(), tokens(length=1)),
    "context-causal-other-keys": (
        context_of("ring", 2, "attend"),
        Across(),
        (real(2, 4, 12).float(), real(2, 8, 12).float()),
    ),
    "context-no-attention": (context_of("ring", 2, "blocks.*.up"), Gpt(), tokens()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_refused(name: str, golden: Callable[[str, str], None]) -> None:
    golden(name, refused(*REFUSED[name]))

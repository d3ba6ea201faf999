from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from meshwright.dsl import (
    STATEMENTS,
    Accumulate,
    Expect,
    Experts,
    Memory,
    Offload,
    Plan,
    PlanError,
    Shard,
    Stages,
)

GPT = """\
# gpt.plan: 3-D parallel GPT with Megatron tensor and sequence parallelism
mesh dp=2,pp=2 , tp=2
let   heads=12
data tokens,
     targets over dp  # the batch
columns blocks.*.attn.qkv over tp as (3 heads hd)
rows blocks.*.attn.proj over (tp)

vocab wte, head over tp
zero 2 over dp
stages at blocks.6 over pp schedule=1f1b microbatches=8


# memory
checkpoint blocks.* keep=[
    sdpa,  # the costly one
    norm]
memory budget=61440MiB
shard blocks.*.up.weight [ (f@tp|f@tp) , ... ] partial( dp )
expect bytes[tp]<=3*1MiB step per blocks.*
"""

EVERY_STATEMENT = """\
mesh row=2, col=2, pp=2, n=1
axes model = (row, col), all = (row, col, pp)
let d = 768, f = 4*d, half = d/2 - (f + 1)/3
data tokens, mask over row dim=1
shard wte.weight [v@model, d]
shard blocks.* -> [b@row, ..., (3 heads@col hd)] partial(pp)
shard blocks.* <- [..., 64] partial(pp, max) partial(n)
columns blocks.*.qkv over col as (heads hd | kv hd | kv hd)
rows "layer-1".{q,k}_proj over (row, col)
vocab head over model
sequence blocks.[0:6] over col
context **.attn over row method=ulysses
summa blocks.* over (row, col) depth=pp
summa blocks.*.attn over (row, col) as (3 heads hd) depth=pp
experts blocks.*.mlp over row count=8 route=topk top=2 capacity=1.25 balance=bias
experts moe over row count=4 dropless=true
experts moe.small over row count=4 groups=8 weight=0.1 second=random noise=0.01 init=fresh seed=3
zero 3 blocks.* over row
stages at blocks.6 over pp schedule="zig.csv" microbatches=f/768
checkpoint blocks.* keep=[sdpa, norm] budget=40GiB
checkpoint blocks.*.mlp segments=4 split=row
offload activations blocks.* fraction=0.5 prefetch=2
offload activations head to=disk path="/scratch/of mine"
offload optimizer
share blocks.* group=4
share head every=2 except=[ln1, "*.bias"]
precision fp16 master=fp32 keep=[softmax] dropout=native
memory budget=60GB
expect all_reduce[model] == 0 backward per blocks.*
expect peak_memory <= 60GiB
allow replicate blocks.*.rope
allow local **.bn
"""


def test_a_plan_is_printed_in_aligned_columns_with_its_comments(
    golden: Callable[[str, str], None],
) -> None:
    golden("format-gpt", Plan.parse(GPT).format())


def test_every_statement_is_printed(golden: Callable[[str, str], None]) -> None:
    golden("format-every-statement", Plan.parse(EVERY_STATEMENT).format())


@pytest.mark.parametrize(
    "text",
    [
        GPT,
        EVERY_STATEMENT,
        "",
        "\n\n# only a comment",
        "mesh a=2\nrows b over a\ncolumns c over a as (f)",
    ],
)
def test_what_is_printed_reads_back_equal_and_prints_alike(text: str) -> None:
    plan = Plan.parse(text)
    printed = plan.format()
    assert Plan.parse(printed) == plan
    assert Plan.parse(printed).format() == printed
    assert hash(Plan.parse(printed)) == hash(plan)


def test_every_verb_is_among_the_statements_tried() -> None:
    tried = {type(each) for each in Plan.parse(EVERY_STATEMENT).statements}
    assert set(STATEMENTS.values()) - tried == {Accumulate}


ALIKE = [
    ("data a, b over dp", "data a,\n  b over dp"),
    ("data a over dp", "data a over (dp)  # a comment\r\n"),
    ("data a over dp", "data a over dp dim=0"),
    ("rows a over model", "rows a over (dp, tp)"),
    ("shard a [(heads@tp hd)]", "shard a [ ( heads @ tp\n hd ) ]"),
    ("shard a [b] partial(tp)", "shard a [b] partial(tp, sum)"),
    ("memory budget=1GiB", "memory budget=1024MiB"),
    ("memory budget=1GiB", "memory budget=2*0.5GiB"),
    ("let x = 3, y = 4\naccumulate x*y", "accumulate 12\nlet x=6/2\nlet y=(x + 1)"),
    ("stages 2", "stages 2 over pp"),
    ("stages at a", "stages at a over pp schedule=1f1b virtual=1"),
    ("experts a over dp count=4 capacity=5/4", "experts a over dp count=4 capacity=1.25"),
    ("checkpoint a keep=sdpa", "checkpoint a keep=[sdpa]"),
    ("rows a over tp\nshare b", "share b\n\n\nrows a over tp"),
]


@pytest.mark.parametrize(("first", "second"), ALIKE)
def test_two_spellings_of_one_plan_are_equal(first: str, second: str) -> None:
    head = "mesh dp=2, tp=2, pp=2\naxes model = (dp, tp)\n"
    lets = [Plan.parse(head + text) for text in (first, second)]
    ours, theirs = ([s for s in plan.statements if s.verb != "let"] for plan in lets)
    assert set(ours) == set(theirs)


def test_order_never_matters() -> None:
    assert Plan.parse("share a\naccumulate 2") == Plan.parse("accumulate 2\nshare a")


def test_two_plans_that_differ_are_not_equal() -> None:
    assert Plan.parse("mesh dp=2") != Plan.parse("mesh dp=4")
    assert Plan.parse("mesh a=2, b=2") != Plan.parse("mesh b=2, a=2")


def test_expressions_are_exact() -> None:
    plan = Plan.parse("let d = 768, third = d/7, back = third*7 - 1e0, tenth = 0.1*10")
    assert plan.lets["back"] == 767
    assert Fraction(int(plan.lets["third"].p), int(plan.lets["third"].q)) == Fraction(768, 7)
    assert plan.lets["tenth"] == 1


def test_options_are_typed() -> None:
    plan = Plan.parse(EVERY_STATEMENT)
    assert plan.mesh == (("row", 2), ("col", 2), ("pp", 2), ("n", 1))
    assert plan.axes["model"] == ("row", "col")
    (stages,) = plan.of(Stages)
    assert (stages.microbatches, stages.schedule, stages.num_stages) == (4, '"zig.csv"', 2)
    assert [shard.of for shard in plan.of(Shard)] == ["tensor", "output", "input"]
    assert plan.of(Memory)[0].budget == 60 * 10**9
    assert plan.of(Offload)[0].fraction == 0.5
    assert plan.of(Experts)[1].dropless is True
    assert [(each.bound, each.window) for each in plan.of(Expect)] == [
        (0, "backward"),
        (60 << 30, ""),
    ]


def test_a_plan_is_read_and_not_made_of_a_text() -> None:
    with pytest.raises(PlanError) as caught:
        Plan("mesh dp=2")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "error[P115]: a plan is made of statements, not of `'mesh dp=2'`\n"
        "  help: read it: `Plan.parse(text)` or `Plan.load(path)`"
    )

"""Every mistake has its text: code, place, caret, what is involved, what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.dsl import Columns, Plan, PlanError, Shard

Golden = Callable[[str, str], None]

MESH = "mesh dp=2, tp=2, pp=2\n"

PARSING = {
    "unknown-verb": "colums blocks.*.up over tp",
    "half-a-verb": "columnsx blocks.*.up over tp",
    "no-verb": "@",
    "misspelt-over": "columns blocks.*.up ovr tp",
    "missing-over": MESH + "columns blocks.*.up",
    "missing-target": MESH + "columns over tp",
    "dash-in-a-name": MESH + "columns layer-1.fc over tp",
    "single-quotes": MESH + "columns 'a' over tp",
    "two-targets-without-comma": MESH + "columns a b over tp",
    "stray-character": MESH + "rows a over tp\0",
    "trailing-comma-before-a-statement": MESH + "data tokens,\ncolumns a over tp",
    "trailing-comma-at-the-end": "mesh dp=2,",
    "bracket-never-closed": MESH + "shard a [b@tp, (c d\nrows b over tp",
    "bracket-that-closes-nothing": MESH + "shard a [b@tp]]",
    "product-without-star": "let d = 2, f = 2d",
    "product-without-star-in-an-option": "let d = 2\naccumulate 2d",
    "power": "let d = 2**3",
    "division-by-zero": "let a = 1/(2 - 2)",
    "string-for-a-number": 'let a = "2"',
    "number-too-large": "let a = 123456789012345678901234567890",
    "exponent-too-large": "let a = 1e999999999",
    "product-too-large": "let a = 4000000000*4000000000",
    "count-not-whole": "accumulate 5/2",
    "count-too-small": "accumulate 0",
    "nested-too-deeply": "let a = " + "(" * 30 + "1" + ")" * 30,
    "expression-too-long": "let a = " + "+".join("1" * 99),
    "unbound-name": "let heads = 12\naccumulate head",
    "unbound-name-in-let": "let d = 2, f = 4*c",
    "names-defined-by-each-other": "let a = b + 1\nlet b = a - 1",
    "name-bound-twice": "let a = 1\nlet a = 2",
    "two-meshes": "mesh dp=2\nmesh tp=2",
    "axis-twice-in-the-mesh": "mesh dp=2, dp=4",
    "axis-of-size-zero": "mesh dp=0",
    "group-named-like-an-axis": MESH + "axes dp = (tp, pp)",
    "unknown-axis": MESH + "rows a over tpp",
    "no-mesh": "rows a over tp",
    "axis-twice-after-over": MESH + "rows a over (tp, tp)",
    "axis-twice-in-a-layout": MESH + "shard a [b@tp, c@(dp, tp)]",
    "axis-split-and-partial": MESH + "shard a [b@tp] partial(tp)",
    "two-ellipses": MESH + "shard a [..., b@tp, ...]",
    "product-in-a-layout": MESH + "shard a [(2*h d@tp)]",
    "factor-without-a-space": MESH + "shard a [(2h@tp d)]",
    "unknown-reduction": MESH + "shard a [b] partial(tp, mix)",
    "as-without-a-name": MESH + "columns a over tp as (3 | 4 heads)",
    "as-with-an-axis": MESH + "columns a over tp as (3 heads@tp)",
    "unknown-option": MESH + "data a over dp dm=1",
    "option-of-a-verb-without-options": MESH + "rows a over tp dim=1",
    "option-twice": MESH + "data a over dp dim=0 dim=1",
    "unknown-choice": MESH + "stages at a over pp schedule=1f2b",
    "unknown-flag": MESH + "experts a over tp dropless=maybe",
    "fraction-out-of-range": "offload optimizer fraction=1.5",
    "files-without-a-folder": "offload optimizer to=disk",
    "folder-without-files": 'offload optimizer path="/scratch"',
    "folder-without-quotes": "offload optimizer to=disk path=/scratch",
    "list-of-numbers": "precision bf16 keep=[1]",
    "comma-between-options": MESH + "stages at a over pp schedule=zb, microbatches=4",
    "unknown-level": MESH + "zero 4 over dp",
    "unknown-type": "precision bf17",
    "unknown-metric": MESH + "expect allreduce[tp] == 0",
    "no-budget": "memory",
    "checkpoint-without-anything": "checkpoint keep=[sdpa]",
    "checkpoint-segments-and-budget": "checkpoint a segments=2 budget=1GiB",
    "checkpoint-no-segments": "checkpoint a segments=0",
    "checkpoint-split-and-budget": MESH + "checkpoint a split=tp budget=1GiB",
    "checkpoint-split-over-no-axis": MESH + "checkpoint a split=tq",
    "stages-without-an-axis": "mesh dp=2\nstages 2",
    "summa-over-one-axis": MESH + "summa a over tp",
    "context-order-without-a-ring": MESH + "context a over tp method=ulysses order=zigzag",
    "summa-depth-twice": MESH + "summa a over (dp, tp) depth=tp",
    "capacity-and-dropless": MESH + "experts a over dp capacity=1.25 dropless=true",
    "experts-route-of-those-there": MESH + "experts a over dp route=switch",
    "experts-dropless-of-those-there": MESH + "experts a over dp dropless=true",
    "experts-switch-to-two": MESH + "experts a over dp count=4 route=switch top=2",
    "experts-second-of-one": MESH + "experts a over dp count=4 route=prototype second=random",
    "experts-dropless-choice": MESH + "experts a over dp count=4 route=expert_choice dropless=true",
    "experts-dropless-second": MESH + "experts a over dp count=4 second=random dropless=true",
    "experts-maximum-of-slots": MESH + "experts a over dp count=4 maximum=1.5",
    "experts-rate-without-a-bias": MESH + "experts a over dp count=4 rate=0.001",
    "experts-choice-by-bias": MESH + "experts a over dp count=4 route=expert_choice balance=bias",
    "experts-weight-of-no-loss": MESH + "experts a over dp count=4 balance=none weight=0.1",
    "experts-second-of-top-1": MESH + "experts a over dp count=4 top=1 second=random",
    "experts-weight-of-choices": MESH
    + "experts a over dp count=4 route=expert_choice weight=0.1",
    "experts-too-few": MESH + "experts a over dp count=2 top=3",
    "experts-uneven-prototypes": MESH + "experts a over dp count=4 route=prototype top=3",
    "unclosed-choice": MESH + "rows {q,k over tp",
    "empty-choice": MESH + "rows {q,}_proj over tp",
    "three-stars": MESH + "rows a.***.b over tp",
    "stars-inside-a-segment": MESH + "rows a**b over tp",
    "two-statements-that-contradict": MESH + "rows a over tp\nrows b, a over dp",
    "two-verbs-that-contradict": MESH + "rows a over tp\n\ncolumns a over tp",
    "two-cuts": MESH + "stages at a over pp\nstages at b over pp",
    "two-precisions": "precision bf16\nprecision fp16",
    "accumulate-and-microbatches": MESH + "accumulate 4\nstages at a over pp microbatches=8",
    "stages-per-rank-of-a-schedule": MESH + "stages 2 over pp schedule=zbv",
    "too-many-stages-per-rank": MESH + "stages 4 over pp schedule=1f1b virtual=2",
    "too-many-stages": MESH + "stages at a, b over pp",
    "too-few-stages": MESH + "stages 3 over (pp, tp)",
    "long-line": MESH + "rows " + "a." * 100 + "b over nowhere",
}  # fmt: skip


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(PlanError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("name", PARSING)
def test_a_mistake_in_the_text_has_its_golden_text(name: str, golden: Golden) -> None:
    golden(f"error-{name}", error_of(lambda: Plan.parse(PARSING[name], "gpt.plan")))


SOLVING = {
    "does-not-divide": (
        "mesh tp=8\nlet heads = 12\nshard w [(3 heads@tp hd), d]", (2304, 768)),
    "does-not-divide-over-two": ("mesh row=4, col=4\nshard w [o@(row, col), i]", (24, 6)),
    "prime": ("mesh tp=2\nshard w [v@tp]", (97,)),
    "fewer-than-ranks": ("mesh tp=4\nlet kv = 2\nshard w [(kv@tp hd)]", (128,)),
    "one-shared-head": (
        "mesh tp=2\nlet q = 4, kv = 1\nshard w [(q@tp hd | kv@tp hd | kv@tp hd)]", (384,)),
    "one-of-two-axes": ("mesh a=2, b=2\nlet kv = 2\nshard w [(kv@(a, b) hd)]", (128,)),
    "not-determined": ("mesh tp=2\nshard w [(x heads@tp), d]", (24, 6)),
    "segments-not-determined": ("mesh tp=2\nlet kv = 2\nshard w [(q@tp hd | kv@tp hd)]", (24,)),
    "does-not-make-the-size": ("mesh tp=2\nlet heads = 5\nshard w [(3 heads@tp hd), d]", (24, 6)),
    "two-sizes-for-one-name": ("mesh tp=2\nshard w [d@tp, d]", (24, 6)),
    "literal-mismatch": ("mesh tp=2\nshard w [(3 8@tp)]", (25,)),
    "rest-does-not-divide": ("mesh tp=2\nshard w [(3 heads@tp hd)]", (25,)),
    "number-of-dims": ("mesh tp=2\nshard w [d@tp]", (24, 6)),
    "too-many-dims": ("mesh tp=2\nshard w [..., a, d@tp]", (24,)),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVING)
def test_a_layout_that_a_tensor_cannot_have_has_its_golden_text(name: str, golden: Golden) -> None:
    text, shape = SOLVING[name]
    plan = Plan.parse(text, "gpt.plan")
    (shard,) = plan.of(Shard)
    golden(f"error-{name}", error_of(lambda: plan.dims(shard.layout, shape, "w: f32")))


def test_fewer_heads_than_ranks_names_both_ways_out(golden: Golden) -> None:
    text = "mesh tp=4\nlet heads = 8, kv = 2\ncolumns qkv over tp as (heads hd | kv hd | kv hd)"
    plan = Plan.parse(text, "phi.plan")
    (columns,) = plan.of(Columns)
    golden(
        "error-fewer-heads-than-ranks",
        error_of(lambda: plan.columns_dim(columns, (768, 64), 0, "layers.0.qkv.weight: bf16")),
    )


NAMES = [f"blocks.{i}.{part}" for i in range(12) for part in ("attn.qkv", "mlp.up")]
RESOLVING = {
    "matches-nothing": "columns blocks.*.atn.qkv over tp",
    "matches-nothing-but-holds-names": "columns blocks.*.mlp over tp",
    "matches-nothing-near": "columns decoder.fc9 over tp",
    "tie": "columns blocks.*.mlp.up over tp\ncolumns *.3.mlp.up over dp",
}


@pytest.mark.parametrize("name", RESOLVING)
def test_a_selector_that_does_not_fit_the_model_has_its_golden_text(
    name: str, golden: Golden
) -> None:
    plan = Plan.parse(MESH + RESOLVING[name], "gpt.plan")
    golden(f"error-{name}", error_of(lambda: plan.resolve(Columns, NAMES)))


def test_the_compiler_can_raise_an_error_at_a_statement(golden: Golden) -> None:
    plan = Plan.parse(MESH + "rows a over tp", "gpt.plan")
    error = plan.error(
        "P501",
        "`a` is not a linear",
        plan.statements[1],
        subject="a: LayerNorm",
        help="name a linear",
    )
    golden("error-from-the-compiler", str(error))


def test_an_unreadable_file_is_a_plan_error(tmp_path: Path) -> None:
    assert "P113" in error_of(lambda: Plan.load(tmp_path / "absent.plan"))
    assert "P113" in error_of(lambda: Plan.load(tmp_path))


def test_a_text_without_end_is_refused_before_it_is_read() -> None:
    assert "P108" in error_of(lambda: Plan.parse("#" * 300_000))

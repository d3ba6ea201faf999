from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from meshwright.dsl import Plan, PlanBuilder, PlanError


def test_a_built_plan_equals_the_text_that_says_the_same() -> None:
    built = (
        Plan.build(mesh={"dp": 2, "tp": 2, "pp": 2})
        .axes(model=("dp", "tp"))
        .let(heads=12, f="4*heads")
        .data("tokens", "targets", over="dp", dim=0)
        .shard("wte.weight", layout="[v@tp, d]")
        .shard("blocks.*", layout="[b@dp, ...] partial(tp)", of="output")
        .columns("blocks.*.qkv", over="tp", factors="(3 heads hd)")
        .rows("blocks.*.proj", over=["tp"])
        .vocab("wte", "head", over="model")
        .sequence("blocks.*", over="tp")
        .context("blocks.*.attn", over="dp", method="ulysses")
        .summa("mlp", over=("dp", "tp"), depth="pp")
        .experts("moe", over="dp", count=8, capacity=1.25, route="switch")
        .zero(2, over="dp")
        .stages("blocks.6", over="pp", schedule="zb", microbatches=8)
        .memory(budget="60GiB")
        .checkpoint("blocks.*", keep=["sdpa"])
        .offload("optimizer")
        .share("blocks.*", group=4, except_=["ln1", "ln2"])
        .precision("bf16", keep=["norm"])
        .expect("all_reduce[tp] == 0", per="blocks.*")
        .allow("replicate", "blocks.*.rope")
        .plan()
    )
    text = """
        mesh dp=2, tp=2, pp=2
        axes model = (dp, tp)
        let heads = 12, f = 48
        data tokens, targets over dp
        shard wte.weight [v@tp, d]
        shard blocks.* -> [b@dp, ...] partial(tp)
        columns blocks.*.qkv over tp as (3 heads hd)
        rows blocks.*.proj over tp
        vocab wte, head over (dp, tp)
        sequence blocks.* over tp
        context blocks.*.attn over dp method=ulysses
        summa mlp over (dp, tp) depth=pp
        experts moe over dp count=8 route=switch capacity=1.25
        zero 2 over dp
        stages at blocks.6 over pp schedule=zb microbatches=8
        memory budget=60GiB
        checkpoint blocks.* keep=[sdpa]
        offload optimizer
        share blocks.* group=4 except=[ln1, ln2]
        precision bf16 keep=[norm]
        expect all_reduce[tp] == 0 per blocks.*
        allow replicate blocks.*.rope
    """
    assert built == Plan.parse(text)


def test_a_mistake_is_an_error_where_it_is_made() -> None:
    builder = Plan.build(mesh={"dp": 2})
    with pytest.raises(PlanError, match="P201"):
        builder.rows("a", over="tp")
    assert builder.rows("a", over="dp").plan() == Plan.parse("mesh dp=2\nrows a over dp")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: plan.stages(2, over="dp"), "a target is `2`, not text"),
        (lambda plan: plan.stages(over="dp"), "`count` is `None`, not a number or text"),
        (lambda plan: plan.precision(torch.bfloat16), "the dtype is a `dtype`, not text"),
        (lambda plan: plan.offload(["optimizer"]), "`what` is a `list` of 1, not text"),
        (lambda plan: plan.allow(None, "a"), "`what` is `None`, not text"),
        (lambda plan: plan.columns("a", over="dp", factors=3), "`factors` is `3`, not text"),
        (lambda plan: plan.rows("a", over=("dp", 2)), "`over` is `2`, not text"),
        (lambda plan: plan.expect("bytes == 0", per=3), "a target is `3`, not text"),
        (
            lambda plan: plan.shard("a", layout="[b]", of=["input"]),
            "`of` is a `list` of 1, not text",
        ),
        (lambda plan: plan.let(d={}), "`d` is a `dict` of 0, not a number or text"),
        (lambda plan: plan.accumulate(10**5000), "`count` is too large"),
    ],
)
def test_a_value_of_another_type_is_an_error_of_the_plan(
    call: Callable[[PlanBuilder], object], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        call(Plan.build(mesh={"dp": 2}))
    assert caught.value.message == message


@pytest.mark.parametrize("target", ["a\nshare b", "a\rshare b", "a # all"])
def test_one_call_cannot_smuggle_in_a_second_statement(target: str) -> None:
    with pytest.raises(PlanError, match="more than one statement"):
        Plan.build(mesh={"dp": 2}).share(target)


def test_a_quoted_name_may_hold_any_character() -> None:
    built = Plan.build(mesh={"dp": 2}).rows('"layer#1"', over="dp").plan()
    assert built == Plan.parse('mesh dp=2\nrows "layer#1" over dp')


def test_a_statement_is_read_once_however_many_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    parse = Plan.parse

    def counting(text: str, name: str = "<plan>") -> Plan:
        read.append(text)
        return parse(text, name)

    monkeypatch.setattr(Plan, "parse", counting)
    builder = Plan.build(mesh={"tp": 2})
    for i in range(20):
        builder.columns(f"blocks.{i}.up", over="tp")
    assert max(len(text.splitlines()) for text in read) == 2
    with pytest.raises(PlanError, match="contradict each other") as caught:
        builder.rows("blocks.7.up", over="tp")
    assert [span and span.line for span in caught.value.spans] == [9, 22]

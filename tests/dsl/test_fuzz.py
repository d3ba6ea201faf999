"""Made and mutilated plans: what is right reads back equal, what is wrong is a `PlanError`."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.dsl import Plan, PlanError

MUTANTS = 10
"""Of each plan that is made."""

NAMES = ["a", "blocks", "up", "tokens", "é", "x1", "experts", "0"]
SEGMENTS = [*NAMES, "*", "**", "[0:6]", "[:]", "{q,k}_proj", "*_proj", '"layer-1"', '"over"']
WORDS = ["sdpa", "norm", "d", "ring"]
AXES = ["dp", "tp", "(dp, tp)", "model"]
JUNK = [
    *"()[]{}@#,.:=*|-+/\"'\\ \n\t\r\0\x85\u2028é\ud800",
    "over ", "as ", "at ", "per ", "**", "->", "<=", "==", "2d", "1f1b", "9" * 30, "1e999", "1/0",
    "partial(tp)", "...", '""', "mesh dp=2\n", "let d = d\n", "((((((((", "{a,", "[0:", "\n\n",
    ",\n", "\ufeff", "\u200b", "\u2013", "\u201c", "\uff1d", "\r\n", "; ",
    " // ", "==", ": ", "[0]", "2x2 ",
    "COLUMNS ", " on tp", "fsdp ", "`", "60 G",
]  # fmt: skip

selector = (
    st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3)
    .map(".".join)
    .filter(lambda text: text not in ("experts", "**.**"))
)
targets = st.lists(selector, min_size=1, max_size=2, unique=True).map(", ".join)
axes = st.sampled_from(AXES)
number = st.sampled_from(["1", "2", "d", "2*d", "(d + 1)*3", "-d + 9", "6/2", "12/d*d"])
factor = st.sampled_from(["3", "heads", "hd", "d"])
segment = st.lists(factor, min_size=1, max_size=3).map(" ".join)
composite = st.lists(segment, min_size=1, max_size=2).map(lambda parts: f"({' | '.join(parts)})")
named = composite.filter(lambda text: all("h" in part or "d" in part for part in text.split("|")))
dims = st.lists(st.one_of(factor, composite), max_size=2)
layout = st.builds(
    lambda before, split, ellipsis, after, partial: (
        f"[{', '.join([*before, split, *ellipsis, *after])}]{partial}"
    ),
    dims,
    st.sampled_from(["b@tp", "64@model", "(3 heads@tp hd)", "(f@tp | f@tp)", "(2 a@(dp, tp) 4)"]),
    st.sampled_from([[], ["..."]]),
    dims,
    st.sampled_from(["", " partial(cp)", " partial(cp, max)", "  partial( (cp,ep) )"]),
)
words = st.lists(st.sampled_from(WORDS), max_size=2).map(lambda items: f"[{', '.join(items)}]")
size = st.sampled_from(["60GiB", "0.5MiB", "1000KB", "3*1GiB", "17"])
one_of = st.sampled_from
optional_targets = st.one_of(st.just(""), targets)
statement = st.one_of(
    st.builds("data {} over {} dim={}".format, targets, axes, number),
    st.builds("shard {} {} {}".format, targets, one_of(["", "->", "<-"]), layout),
    st.builds("columns {} over {} as {}".format, targets, axes, named),
    st.builds("{} {} over {}".format, one_of(["columns", "rows", "vocab"]), targets, axes),
    st.builds("sequence {} over {}".format, targets, axes),
    st.builds("context {} over {} method={}".format, targets, axes, one_of(["ring", "ulysses"])),
    st.builds("summa {} over (dp, tp) depth=cp".format, targets),
    st.builds("zero {} {} over {}".format, one_of("123"), optional_targets, axes),
    st.builds(
        "stages {} schedule={} microbatches={} virtual=1".format,
        one_of(["at a", "at blocks.* over pp", "d", "2 over pp"]),
        one_of(["1f1b", "zb", '"file.csv"']),
        number,
    ),
    st.builds("accumulate {}".format, number),
    st.builds("memory budget={}".format, size),
    st.builds("checkpoint {} keep={} budget={}".format, targets, words, size),
    st.builds("checkpoint {} segments={}".format, targets, number),
    st.builds(
        "offload {} {} fraction=0.25 prefetch={}".format,
        one_of(["activations", "parameters", "optimizer"]),
        optional_targets,
        number,
    ),
    st.builds(
        "experts {} over ep count={} route=topk top=2 capacity={} balance=aux".format,
        targets,
        number,
        one_of(["1.25", "5/4", "1e-1", "d"]),
    ),
    st.builds("share {} every={} except={}".format, targets, number, words),
    st.builds("precision {} master=fp32 keep={}".format, one_of(["bf16", "fp16"]), words),
    st.builds(
        "expect {} {} {} {} {}".format,
        one_of(["all_reduce[tp]", "bytes[(dp, tp)]", "peak_memory", "all_gather[model]"]),
        one_of(["==", "<=", "<", ">=", ">", "!="]),
        st.one_of(number, size),
        one_of(["", "forward", "backward", "step"]),
        st.one_of(st.just(""), targets.map("per {}".format)),
    ),
    st.builds("allow {} {}".format, one_of(["replicate", "local"]), targets),
    one_of(["# a comment", "", "let e = 4*d, g = (e - 1)/3", "share a  # why"]),
)
HEAD = "mesh dp=2, tp=d, pp=2, cp=2, ep=2\naxes model = (dp, tp)\nlet d = 2\n"
plans = st.lists(statement, min_size=1, max_size=4).map(lambda lines: HEAD + "\n".join(lines))


def mutated(text: str, random: random.Random) -> str:
    """The text with a few pieces cut, doubled, swapped or replaced by junk."""
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(text) + 1)
        end = min(len(text), at + random.randint(0, 6))
        match random.randrange(4):
            case 0:
                text = text[:at] + text[end:]
            case 1:
                text = text[:at] + random.choice(JUNK) + text[at:]
            case 2:
                text = text[:at] + random.choice(JUNK) + text[end:]
            case _:
                text = text[:end] + text[at:]
    return text


def checked(text: str) -> Plan | None:
    """The plan, or `None` for an error that renders; any other exception is a failed test."""
    before = time.process_time()
    try:
        return Plan.parse(text)
    except PlanError as wrong:
        error = wrong
    rendered = str(error)
    assert time.process_time() - before < 1, text
    assert rendered.startswith(f"error[{error.code}]: "), text
    assert error.help, text
    assert all(line.isprintable() for line in rendered.splitlines()), text
    return None


@pytest.mark.parametrize("examples", [250, pytest.param(2_000, marks=pytest.mark.slow)])
def test_only_plan_errors_come_out_and_what_is_read_reads_back_equal(examples: int) -> None:
    seen = Counter[str]()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(plans, st.integers(0, 2**32))
    def check(text: str, seed: int) -> None:
        choices = random.Random(seed)
        for candidate in [text, *(mutated(text, choices) for _ in range(MUTANTS))]:
            plan = checked(candidate)
            seen["wrong" if plan is None else "right"] += 1
            if plan is not None:
                printed = plan.format()
                again = Plan.parse(printed)
                assert again == plan, candidate
                assert again.format() == printed, candidate

    check()
    assert seen.total() >= examples * MUTANTS
    assert min(seen.values()) > examples, f"one-sided: {seen}"


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.text(max_size=40))
def test_only_plan_errors_come_out_of_any_text(text: str) -> None:
    checked(text)

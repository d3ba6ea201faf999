from __future__ import annotations

import time

import pytest

from meshwright.dsl import Columns, Plan, PlanError, Selector
from meshwright.dsl.suggest import selectors_of

NAMES = [
    "",
    "wte",
    "blocks",
    *(f"blocks.{i}" for i in range(12)),
    *(f"blocks.{i}.attn.{part}_proj" for i in range(12) for part in "qkvo"),
    "blocks.0.attn",
    "layer-1.fc",
    "over",
]

MATCHES = [
    ("wte", ["wte"]),
    ("blocks.*", [f"blocks.{i}" for i in range(12)]),
    ("blocks.[0:2]", ["blocks.0", "blocks.1"]),
    ("blocks.[10:]", ["blocks.10", "blocks.11"]),
    ("blocks.[:1]", ["blocks.0"]),
    ("blocks.{3,5}", ["blocks.3", "blocks.5"]),
    ("blocks.0.attn.{q, k}_proj", ["blocks.0.attn.q_proj", "blocks.0.attn.k_proj"]),
    ("blocks.1*", ["blocks.1", "blocks.10", "blocks.11"]),
    ("**.1.**.q_proj", ["blocks.1.attn.q_proj"]),
    ("**.[9:11].**", ["blocks.9", "blocks.10"] + [
        f"blocks.{i}.attn.{p}_proj" for i in (9, 10) for p in "qkvo"]),
    ("*.2.*.[0:1]", []),
    ("blocks.0.attn.*_pro", []),
    ("blocks.0.attn.q*p*j", ["blocks.0.attn.q_proj"]),
    ("w*te", ["wte"]),
    ("wt*te", []),
    ('"layer-1".fc', ["layer-1.fc"]),
    ('"over"', ["over"]),
    ('""', [""]),
    ("**.attn", ["blocks.0.attn"]),
    ("blocks.0.attn.**.**.q_proj", ["blocks.0.attn.q_proj"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "names"), MATCHES)
def test_a_selector_matches_these_names(text: str, names: list[str]) -> None:
    assert Selector(text).match(NAMES) == names


def test_two_stars_match_everything_the_model_itself_included() -> None:
    assert Selector("**").match(NAMES) == NAMES


WINS = [  # of two selectors, the first, the second or neither, on a name
    ("blocks.3.up", "blocks.*.up", "blocks.3.up", "first"),
    ("blocks.*.up", "blocks.[0:6].up", "blocks.3.up", "second"),
    ("blocks.{3,4}.up", "blocks.[0:6].up", "blocks.3.up", "neither"),
    ("blocks.*.u*", "blocks.*.*", "blocks.3.up", "first"),
    ("blocks.*.*", "blocks.**", "blocks.3.up", "first"),
    ("**", "blocks.**", "blocks.3.up", "second"),
    ("**.up", "blocks.*.up", "blocks.3.up", "second"),
    ("**.up", "blocks.**", "blocks.3.up", "neither"),
    ("*.3.up", "blocks.*.up", "blocks.3.up", "neither"),
    ("blocks.*.up", "blocks.*.{up,down}", "blocks.3.up", "first"),
    ('"blocks".*.up', "blocks.*.up", "blocks.3.up", "neither"),
]


@pytest.mark.parametrize(("first", "second", "name", "winner"), WINS)
def test_the_more_specific_selector_wins(first: str, second: str, name: str, winner: str) -> None:
    text = f"mesh a=2, b=2\ncolumns {first} over a\ncolumns {second} over b"
    plans = [Plan.parse(text), Plan.parse("\n".join(reversed(text.splitlines())))]
    if winner == "neither":
        for plan in plans:
            with pytest.raises(PlanError, match="neither selector is more specific"):
                plan.resolve(Columns, [name])
    else:
        axis = {"first": "a", "second": "b"}[winner]
        assert [plan.resolve(Columns, [name])[name].over for plan in plans] == [(axis,)] * 2


def test_two_selectors_that_tie_but_say_the_same_do_not_contradict() -> None:
    plan = Plan.parse("mesh a=2\ncolumns *.3.up over a\ncolumns blocks.*.up over a")
    assert plan.resolve(Columns, ["blocks.3.up"])["blocks.3.up"].over == ("a",)


def test_hostile_patterns_match_in_little_time() -> None:
    started = time.perf_counter()
    assert not Selector("*a" * 40 + "b").matches("a" * 4000)
    assert not Selector(".".join(["**.a"] * 40)).matches(".".join(["a", "b"] * 30))
    assert time.perf_counter() - started < 1


def test_names_that_differ_only_in_numbers_share_a_selector() -> None:
    names = ["a.0.up", "a.0.1.b", "a.1.up", "a.2.1.b", "0", "my-net.fc", "", "head", "memory"]
    texts = selectors_of(names)
    assert texts == ["a.*.up", "a.*.1.b", '"0"', '"my-net".fc', '""', "head", '"memory"']
    assert selectors_of(["0", "2"]) == ["*"]
    assert all(any(Selector(text).matches(name) for text in texts) for name in names)
    assert all(Plan.parse(f"allow replicate {text}\n").statements for text in texts)

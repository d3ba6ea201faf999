"""Texts of any length are read or refused in words, in time that grows with their length."""

from __future__ import annotations

import time

import pytest

from meshwright.dsl import Columns, Plan, PlanError
from meshwright.dsl.reading.parser import MOST_CHARACTERS

MESH = "mesh dp=2, tp=2\n"
MANY, SOME = 10**5, 2500
"""More than any text may have, and what just fits."""

LONGEST_SECONDS = 3.0
"""Of processor time; none takes more than one where the machine is idle."""


def lines(text: str, count: int = SOME) -> str:
    """A line for each number, with the number before for `<`."""
    return "".join(
        text.replace("<", str(max(i - 1, 0))).replace("#", str(i)) + "\n" for i in range(count)
    )


def joined(text: str, separator: str, count: int = SOME) -> str:
    return separator.join(text.replace("#", str(i)) for i in range(count))


LONG = {
    "chain-of-lets": "let a = 2, a0 = 1\n" + lines("let a# = a< + 0")[len("let a0 = a0 + 0\n") :],
    "lets-backwards": "\n".join(
        ["let a0 = 2", *(f"let a{i} = a{i - 1} + 1" for i in range(1, SOME))][::-1]
    ),
    "lets-in-a-circle": lines("let a# = a<").replace("let a0 = a0", f"let a0 = a{SOME - 1}"),
    "ten-thousand-lets": lines("let a# = 1", 10_000),
    "statements": MESH + lines("columns b.#.up over tp", 2000),
    "one-statement-again-and-again": MESH + lines("columns up over tp", 3000),
    "targets": MESH + "columns " + joined("b#", ", ", 8000) + " over tp",
    "sum": "let a = " + "+".join("1" * 30_000),
    "product": "let a = " + "*".join("2" * 30_000),
    "powers": "let a = 2" + "**2" * 20_000,
    "brackets": "let a = " + "(" * 10_000 + "1" + ")" * 10_000,
    "nested-lists": "precision bf16 keep=" + "[" * 10_000 + "]" * 10_000,
    "signs": "let a = " + "-" * 10_000 + "1",
    "doubled-sizes": "let a0 = 2\n" + lines("let a# = a<*a<", 300)[len("let a0 = a0*a0\n") :],
    "expanding-products": "let x = 1, y = 2, a = " + "*".join(["(x + y)"] * 60),
    "digits": "let a = " + "9" * 60_000,
    "digits-and-a-letter": "let a = " + "9" * 60_000 + "d",
    "exponent": "let a = 1e" + "9" * 60_000,
    "size": "memory budget=" + "9" * 60_000 + "GiB",
    "long-name": MESH + "columns " + "a" * 60_000 + " over tp",
    "deep-name": MESH + "columns " + "a." * 30_000 + "b over tp",
    "stars": MESH + "columns " + "a*" * 30_000 + " over tp",
    "choices": MESH + "columns " + "{a,b}" * 5000 + " over tp",
    "choice-of-many": MESH + "columns {" + joined("a#", ",") + "} over tp",
    "slice": MESH + "columns a.[" + "9" * 60_000 + ":] over tp",
    "dims": MESH + "shard w [" + joined("d#", ", ", 7000) + "]",
    "split-dims": MESH + "shard w [" + joined("d#@tp", ", ", 5000) + "]",
    "factors": MESH + "shard w [(" + joined("d#", " ", 7000) + ")]",
    "segments": MESH + "shard w [(" + joined("d#@tp", " | ", 5000) + ")]",
    "axes": "mesh " + joined("a#=1", ", ") + "\nrows a over (" + joined("a#", ", ") + ")",
    "axis-of-none": "mesh " + joined("a#=1", ", ") + "\nrows a over bxx",
    "groups-of-groups": "mesh a=1\naxes g0 = a\n" + lines("axes g# = g<")[len("axes g0 = g0\n") :],
    "options": MESH + "data x over dp" + " dim=0" * 8000,
    "blank-lines": MESH + "\n" * 60_000,
    "blanks": MESH + "rows" + " " * 60_000 + "a over tp x",
    "comments": MESH + lines("# why #", 6000),
    "not-a-plan": "@" * MANY,
    "one-character": "\u200b" * 60_000,
    "quotes": '"' * 60_000,
}


def read_or_refused(text: str) -> str:
    """The error of a text; nothing for one that is read, and reads back equal."""
    try:
        plan = Plan.parse(text)
    except PlanError as error:
        return str(error)
    assert Plan.parse(plan.format()) == plan
    return ""


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_is_read_or_refused_in_words_and_in_time(name: str) -> None:
    before = time.process_time()
    text = read_or_refused(LONG[name])
    assert len(text) < 1200
    assert len(text.splitlines()) < 12
    # Twice, where it was printed and read again.
    assert time.process_time() - before < 3 * LONGEST_SECONDS


def test_a_text_of_more_characters_than_any_plan_needs_is_refused_at_once() -> None:
    before = time.process_time()
    with pytest.raises(PlanError, match="more than 65536 characters"):
        Plan.parse(lines("let a# = 1", MOST_CHARACTERS))
    assert time.process_time() - before < LONGEST_SECONDS


def test_lists_of_names_in_errors_are_cut() -> None:
    with pytest.raises(PlanError) as circle:
        Plan.parse(LONG["lets-in-a-circle"])
    assert f"and {SOME - 8} more" in circle.value.message
    with pytest.raises(PlanError) as axis:
        Plan.parse(LONG["axis-of-none"])
    assert "or one of 2488 more" in axis.value.help


def test_a_long_plan_is_resolved_against_a_large_model_in_time() -> None:
    plan = Plan.parse(MESH + lines("columns b.#.up over tp", 1000))
    names = [f"b.{i}.{part}" for i in range(2000) for part in ("up", "down", "norm")]
    before = time.process_time()
    assert len(plan.resolve(Columns, names)) == 1000
    assert time.process_time() - before < LONGEST_SECONDS


def test_many_wildcards_match_in_time() -> None:
    plan = Plan.parse(MESH + "columns " + "**.a.*." * 60 + "b over tp")
    names = [".".join(["a"] * depth) for depth in range(1, 150)]
    before = time.process_time()
    with pytest.raises(PlanError, match="matches nothing"):
        plan.resolve(Columns, names)
    assert time.process_time() - before < LONGEST_SECONDS


def test_a_plan_of_hundreds_of_calls_is_built_in_time() -> None:
    before = time.process_time()
    builder = Plan.build(mesh={"dp": 2, "tp": 2})
    for i in range(600):
        builder.columns(f"b.{i}.up", over="tp")
    assert len(builder.plan().statements) == 601
    assert time.process_time() - before < 2 * LONGEST_SECONDS

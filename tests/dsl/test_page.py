"""The page that teaches the language says nothing that the language does not do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meshwright.dsl import CODES, STATEMENTS, Plan

PAGE = (Path(__file__).parents[2] / "docs" / "plan-language.md").read_text(encoding="utf-8")
HEAD = "mesh dp=2, tp=2, row=2, col=2, pp=2, cp=2, ep=2, z=2\n"


def test_every_code_is_on_the_page() -> None:
    rows = [f"| {code} | {meaning} |" for code, meaning in CODES.items()]
    assert [row for row in rows if row not in PAGE] == []


def test_every_verb_is_on_the_page() -> None:
    assert [verb for verb in STATEMENTS if f"| `{verb} " not in PAGE] == []


@pytest.mark.parametrize("line", re.findall(r"^\| `(\w+ [^`]*)` \|", PAGE, re.M))
def test_every_statement_in_a_table_is_right(line: str) -> None:
    text = line.replace("SEL", "blocks.*").replace("LAYOUT", "[b@dp, d]")
    head = "" if line.startswith("mesh") else HEAD
    assert Plan.parse(head + text).statements

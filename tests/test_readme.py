"""The README's code runs and prints what the README says; pages name files that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import meshwright as mw
from meshwright.compiler.show import show_text
from meshwright.dsl.statements import STATEMENTS
from meshwright.passes.supported import CARRIED_OUT

README = Path(__file__).parents[1] / "README.md"


def blocks(kind: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for name, body in found if name == kind]


def test_the_code_runs_and_its_graph_and_table_are_those_printed() -> None:
    (code,) = blocks("python")
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), found)
    program: mw.Program = found["program"]
    graph, table = blocks("")[:2]
    assert graph in str(program.graph("stage0.forward"))
    assert table.rstrip() in show_text(program)
    alone = found["MLP"]()
    alone.load_state_dict(program.model.state_dict())
    torch.testing.assert_close(found["loss"], alone(found["x"], found["y"]).detach())


def test_every_link_and_every_verb_said_to_be_missing_is_right() -> None:
    text = README.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (README.parent / link).exists(), link
    missing = text.partition("## What is not there yet")[2].partition("parse and format")[0]
    verbs = {verb for verb, kind in STATEMENTS.items() if kind not in CARRIED_OUT}
    expected = verbs | {"allow local"}
    assert set(re.findall(r"`([a-z ]+)`", missing)) == expected


def test_every_file_that_the_architecture_page_names_exists() -> None:
    text = (README.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = ("dsl", "compiler", "passes", "runtime", "src", "tests")
    names = {path.name for folder in folders for path in (README.parent / folder).rglob("*")}
    for name in re.findall(r"`(?:\w+/)*(\w+\.(?:py|lark))`", text):
        assert name in names, name

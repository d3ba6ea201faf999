"""What the README computes and says is missing; the files that the page on architecture names.

That blocks of code run, and links lead somewhere, is in `tests/docs`.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import torch

import meshwright as mw
from meshwright.dsl.statements import STATEMENTS
from meshwright.passes.contracts.supported import CARRIED_OUT
from tests.docs.pages import blocks

README = Path(__file__).parents[1] / "README.md"


def test_the_code_on_the_first_screen_computes_what_one_process_does() -> None:
    code = next(block for block in blocks(README) if block.language == "python")
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code.text, "README.md", "exec"), found)
    program: mw.Program = found["program"]
    alone = found["MLP"]()
    alone.load_state_dict(program.model.state_dict())
    torch.testing.assert_close(found["loss"], alone(found["x"], found["y"]).detach())


def test_every_verb_said_to_be_missing_is_and_no_other() -> None:
    text = README.read_text(encoding="utf-8")
    missing = text.partition("## What is not there yet")[2].partition("parse and format")[0]
    verbs = {verb for verb, kind in STATEMENTS.items() if kind not in CARRIED_OUT}
    assert set(re.findall(r"`([a-z ]+)`", missing)) == verbs | {"allow local"}


def test_every_file_that_the_architecture_page_names_exists() -> None:
    text = (README.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = ("dsl", "compiler", "passes", "runtime", "src", "tests", "docs")
    names = {path.name for folder in folders for path in (README.parent / folder).rglob("*")}
    for name in re.findall(r"`(?:\w+/)*(\w+\.(?:py|lark))`", text):
        assert name in names, name

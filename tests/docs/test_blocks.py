"""Every block of code in the documentation does what it says; `pages.py` says how it is told."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.cli import main
from meshwright.compiler.schedules.files import read_table
from meshwright.compiler.schedules.tables import Size
from meshwright.dsl import STATEMENTS
from meshwright.dsl.source import Source
from tests.docs.pages import (
    LANGUAGES,
    PAGES,
    ROOT,
    Block,
    blocks,
    code_spans,
    name_of,
    rows_of,
    tokens,
)

MESH = "mesh dp=2, tp=2, row=2, col=2, pp=2, cp=2, ep=2, z=2\n"
"""For parts of plans: every axis that a page names."""
GROUPS = "axes model = (row, col)\n"
NOT_RUN = {
    "docs/architecture.md": ["plan text ── dsl ──► Plan ──────────────────┐"],
    "docs/launching.md": [
        "rank 1 of 2 failed: ValueError: no such label",
        "meshwright run train.py --processes 4 --nodes 2 --node-rank 0 --rendezvous first:29500",
    ],
    "docs/training.md": ["`sub` in `blocks.1` made a NaN on rank 0"],
}
"""The blocks that are `text`, by their first lines."""


def of(language: str) -> list[Path]:
    """The pages that have blocks of a language."""
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


def test_every_block_says_what_becomes_of_it() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert len(found) > 30
    assert [str(block) for block in found if block.language not in LANGUAGES] == []
    indented = [name_of(page) for page in PAGES for t in tokens(page) if t.type == "code_block"]
    assert indented == [], "fence these blocks, and say what becomes of them"


def test_every_output_stands_after_what_prints_it() -> None:
    for page in PAGES:
        python = False
        for before, block in pairwise([None, *blocks(page)]):
            python = python or block.language == "python"
            if block.language == "output":
                assert before is not None, block
                assert before.language in ("python", "plan", "sh"), block
                assert python or before.language == "sh", block


def test_the_blocks_that_are_not_run_are_known() -> None:
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language == "text":
                found.setdefault(name_of(page), []).append(block.text.splitlines()[0].strip())
    assert found == NOT_RUN


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The repository's folder as a reader has it: with the examples, and room to write."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield tmp_path


@pytest.mark.parametrize("page", of("python"), ids=name_of)
def test_the_python_of_a_page_runs_and_prints_what_the_page_says(page: Path, folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": page.stem}
    printed, missing = "", []
    for before, block in pairwise([None, *blocks(page)]):
        if block.language == "python":
            printed = run_python(block, namespace)
        elif block.language == "output" and before is not None and before.language != "sh":
            said = printed if before.language == "python" else told(before, namespace)
            if block.text not in stripped(said):
                missing.append(f"{block}: not in\n{said}")
    assert missing == [], "\n".join(missing)


def run_python(block: Block, namespace: dict[str, Any]) -> str:
    """What a block prints; an error in it is at the page's own line."""
    file = re.match(r"# (examples/\S+\.py)\n", block.text)
    if file:
        text = (ROOT / file.group(1)).read_text(encoding="utf-8")
        assert block.text.partition("\n")[2].strip() == text.strip(), f"{block} is not that file"
    code = compile("\n" * block.line + block.text, str(block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, namespace)
    return printed.getvalue()


def stripped(text: str) -> str:
    """The text without spaces at the ends of lines, which no page should have."""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def told(block: Block, namespace: dict[str, Any]) -> str:
    """What compiling the page's model under this plan is refused with."""
    plan = mw.Plan.parse(block.text, "gpt.plan")
    with pytest.raises(mw.MeshwrightError) as caught:
        mw.compile(namespace["model"], plan, namespace["example"])
    return str(caught.value)


@pytest.mark.parametrize("page", of("plan"), ids=name_of)
def test_every_plan_is_one_and_prints_as_an_equal_one(page: Path) -> None:
    for block in blocks(page):
        if block.language == "plan":
            whole = re.search(r"^mesh ", block.text, re.M)
            groups = "" if whole or "axes model" in block.text else GROUPS
            text = ("" if whole else MESH) + groups + block.text
            plan = mw.Plan.parse(text, str(block))
            assert mw.Plan.parse(plan.format()) == plan, block


@pytest.mark.parametrize("page", of("csv"), ids=name_of)
def test_every_schedule_can_be_carried_out(page: Path) -> None:
    for block in blocks(page):
        if block.language == "csv":
            source = Source(str(block), block.text)
            assert read_table(source, Size(2, 2)).rows


def statements(page: Path) -> list[str]:
    """What stands in running text as a statement of the language; two words only name one."""
    found = [span.replace("SEL", "x").replace("LAYOUT", "[b@dp, d]") for span in code_spans(page)]
    return [
        text
        for text in found
        if text.split()[0] in STATEMENTS and len(text.split()) > 2 and "..." not in text
    ]


@pytest.mark.parametrize("page", [*filter(statements, PAGES)], ids=name_of)
def test_every_statement_in_running_text_is_one(page: Path) -> None:
    for text in statements(page):
        stages = re.match(r"stages (\d+)", text)
        mesh = MESH.replace("pp=2", f"pp={stages.group(1)}") if stages else MESH
        head = "" if text.startswith("mesh") else mesh
        groups = "" if text.startswith(("mesh", "axes")) else GROUPS
        assert mw.Plan.parse(head + groups + text, name_of(page)).statements


# -- the shell --------------------------------------------------------------------------------


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


SHELL = [block for page in PAGES for block in blocks(page) if block.language == "sh"]


def test_what_the_shell_is_told_is_there() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for block in SHELL:
        for words in commands(block):
            if words[0] == "make":
                assert words[1] in targets, block
            elif words[0] == "pip":
                installed = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
                assert words[1:4] == ["install", "-c", "constraints.txt"], block
                assert f"-m pip install --quiet {' '.join(words[2:4])}" in installed, block
            else:
                assert words[0] in ("meshwright", "torchrun", "python"), block


def test_every_command_that_a_page_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    usages = re.findall(r"^ {2}(meshwright .*)$", capsys.readouterr().out, re.M)
    known = {usage.split()[1] for usage in usages}
    assert {"check", "show", "run"} <= known
    spans = [span.split() for page in PAGES for span in code_spans(page)]
    named = {words[1] for words in spans if words[:1] == ["meshwright"] and len(words) > 1}
    assert named - known == set()
    listed = [row[0] for row in rows_of(ROOT / "README.md", "The first hour")]
    assert [spans[0] for spans in listed] == [u for u in usages if "help" not in u]


def launches(words: list[str]) -> bool:
    """Whether a command starts processes of its own; the others are called in this one."""
    return words[0] in ("python", "torchrun") or words[:2] == ["meshwright", "run"]


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block), marks=[pytest.mark.slow] * any(map(launches, words)))
        for block in SHELL
        if (words := commands(block))
    ],
)
def test_a_shell_block_runs_and_prints_what_the_page_says(block: Block, folder: Path) -> None:
    printed = ""
    for words in commands(block):
        if words[0] not in ("make", "pip"):
            printed += run_shell(words, folder) if launches(words) else run_here(words[1:])
    page = blocks(block.page)
    after = page[page.index(block) + 1 :][:1]
    if after and after[0].language == "output":
        assert after[0].text in stripped(printed), f"{after[0]}: not in\n{printed}"


def run_here(words: list[str]) -> str:
    """What one of our own commands prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(words) == 0, words
    return printed.getvalue()


def run_shell(words: list[str], folder: Path) -> str:
    """What a command prints. A benchmark, which takes minutes, is asked for its options instead."""
    options = [word for word in words if word.startswith("--")]
    if words[1] == "-m" and words[2].startswith("benchmarks."):
        words = [*words[:3], "--help"]
    module = {"meshwright": ["-m", "meshwright"], "torchrun": ["-m", "torch.distributed.run"]}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    found = subprocess.run(
        [sys.executable, *module.get(words[0], []), *words[1:]], cwd=folder, env=environment,
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert found.returncode == 0, f"{shlex.join(words)}\n{found.stdout}\n{found.stderr}"
    if words[-1] == "--help":
        assert [option for option in options if option not in found.stdout] == []
    return found.stdout

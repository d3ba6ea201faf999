"""What a notebook and a debugger print of the objects that a user holds: one or two lines each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from html.parser import HTMLParser
from typing import Any

import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.dsl.writing.html import LIMIT, html_table
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens

PLAN = "mesh dp=2, tp=2\n" + GPT_DATA + GPT_TENSOR
CHANGING = {"launch", "recompile", "runtime", "load", "save", "step", "close", "forward", "run"}


@cache
def gpt() -> mw.Program:
    return mw.compile(Gpt(layers=12), mw.Plan.parse(PLAN, "gpt.plan"), tokens(), device="cpu")


def parts(value: object) -> Iterator[tuple[str, object]]:
    """The public attributes of an object of ours, what its methods return, and items."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in list(value.items())[:2])
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", item) for i, item in enumerate(value[:2]))
    elif type(value).__module__.startswith("meshwright"):
        for name in dir(value):
            if not name.startswith("_") and name not in CHANGING:
                found = getattr(value, name, None)
                yield f".{name}", _called(found) if inspect.ismethod(found) else found


def _called(method: Any) -> object:
    parameters = inspect.signature(method).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    wanted = [p for p in parameters if p.default is p.empty and p.kind not in variadic]
    try:
        return None if wanted else method()
    except mw.MeshwrightError:
        return None


def reachable(value: object, path: str, depth: int) -> Iterator[tuple[str, object]]:
    if type(value).__module__.startswith("meshwright"):
        yield path, value
    if depth:
        for name, part in parts(value):
            yield from reachable(part, path + name, depth - 1)


def test_every_object_that_a_user_can_reach_prints_in_a_few_lines() -> None:
    with gpt().launch() as run:
        optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
        graph, reasons = gpt().graph("stage0.backward"), gpt().explain("blocks.3.up")
        roots = {"run": run, "optimizer": optimizer, "graph": graph, "reasons": reasons}
        kinds = set()
        for name, root in {"plan": gpt().plan, "program": gpt(), **roots}.items():
            for path, value in reachable(root, name, 4):
                text = repr(value)
                assert len(text) < 500, (path, text[:200])
                assert " object at 0x" not in text, (path, text)
                kinds.add(type(value).__name__)
    named = {"Program", "Graph", "GraphText", "Node", "Plan", "Run", "Comm", "Memory", "Captured"}
    assert named | {"Layout", "Mesh", "Stored", "Moved", "Explanation", "Code"} <= kinds


def test_what_a_program_and_its_parts_are_is_in_their_repr() -> None:
    program = gpt()
    text = repr(program)
    for said in ("Gpt under gpt.plan", "mode train", "mesh dp=2, tp=2", "sent per rank per step"):
        assert said in text
    assert f"{len(program.comm())} collectives" in repr(program.comm())
    assert f"{len(program.graphs()['stage0.forward'].nodes)} nodes" in repr(
        program.graph("stage0.forward")
    )
    assert repr(program.plan) == "<Plan gpt.plan: 6 statements, mesh dp=2, tp=2>"
    run = program.launch()
    assert repr(run) == (
        "<Run: Gpt under gpt.plan, mesh dp=2, tp=2, every rank in this process, after step 0>"
    )
    run.close()
    assert repr(run).endswith("closed>")


class Checker(HTMLParser):
    """Every tag is closed, in the order in which they were opened; text is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.add(tag)
        styles = dict(attributes)
        assert styles.keys() <= {"style", "colspan"}
        for said in ("#", "rgb", ":black", ":white", "url"):
            assert said not in (styles.get("style") or ""), "dark and light themes"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    assert checker.seen <= {"div", "table", "caption", "tr", "th", "td"}
    return checker


def test_notebooks_show_plan_program_graph_and_collectives_as_tables() -> None:
    program = gpt()
    graph = program.graph("stage0.forward")
    for value, said in (
        (program.plan, "columns blocks.*.qkv over tp as (3 heads hd)"),
        (program, "blocks.*.down.weight"),
        (graph, "blocks.1 to blocks.11: the same 12 inputs each"),
        (program.comm(), "all_reduce[tp]"),
    ):
        html = value._repr_html_()
        assert said in checked(html).text
        assert len(html) < 150_000, type(value)


class Awkward(nn.Module):
    """A module's name, and with it a parameter's, may hold anything but a dot."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("<b>&", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "<b>&")(x).sum()


def test_names_and_plans_are_escaped() -> None:
    plan = mw.Plan.parse("mesh dp=2\ndata x over dp # <script>alert(1)</script>\n", "<i>.plan")
    program = mw.compile(Awkward(), plan, (torch.zeros(4, 4),), device="cpu")
    for value in (plan, program, program.graph("stage0.forward"), program.comm()):
        for tag in ("<b>", "<script", "<i>"):
            assert tag not in value._repr_html_()
    assert "<b>&" in checked(program._repr_html_()).text
    assert "<script>" in checked(plan._repr_html_()).text


def test_a_plan_in_a_notebook_has_the_line_numbers_of_its_errors() -> None:
    plan = mw.Plan.parse("mesh dp=2  # a form\ffeed\ndata x over dp\n")
    assert "2data x over dp" in checked(plan._repr_html_()).text


def test_tables_are_bounded_in_rows_and_cells() -> None:
    checker = checked(html_table(("a", "b"), [("x" * 10_000, "y")] * 10_000, title="t"))
    assert f"{10_000 - LIMIT} more" in checker.text
    assert len(checker.text) < 500 * LIMIT

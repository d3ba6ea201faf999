"""The page of the public interface is what the docstrings say, and what they say is so."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from docs.make_api import COMMAND, MACHINERY, PAGE, Entry, attributes, entries, members, page
from examples import gpt
from meshwright.compiler.costs.cluster import Cluster
from meshwright.passes.contracts import allow
from meshwright.runtime.checkpoint import saving
from tests.docs.pages import ROOT, blocks

ENTRIES = list(entries())
OWNERS = {entry.name: entry for entry in ENTRIES if isinstance(entry.object, type)}
FUNCTIONS = [entry for entry in ENTRIES if inspect.isfunction(entry.object)]


def owner(entry: Entry) -> Entry | None:
    """The class of a method or property."""
    return OWNERS.get(entry.name.rpartition(".")[0])


def test_the_page_is_what_the_docstrings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), f"run `{COMMAND}`"


def test_every_public_name_is_on_the_page() -> None:
    shown = {id(entry.object) for entry in ENTRIES}
    assert [name for name in mw.__all__ if id(getattr(mw, name)) not in shown] == []


def test_what_the_page_leaves_out_is_there_to_be_left_out() -> None:
    for cls, hidden in MACHINERY.items():
        fields = (
            {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        )
        assert set(hidden) <= {*dir(cls), *fields}, cls


def test_every_signature_is_one() -> None:
    stubs = [block for block in blocks(PAGE) if block.language == "pyi"]
    assert len(stubs) > 50
    for block in stubs:
        assert ast.parse(block.text), block


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_docstring_begins_with_what_the_thing_is_or_does(entry: Entry) -> None:
    first = entry.text.partition("\n\n")[0]
    assert re.match(r"(?!What|Whether|This|It )[A-Z][a-z]*\b", first), first
    assert first.rstrip()[-1:] in (".", ":"), first


@pytest.mark.parametrize("entry", FUNCTIONS, ids=lambda entry: entry.name)
def test_a_docstring_names_every_parameter(entry: Entry) -> None:
    of = owner(entry)
    said = entry.text + (of.text if of is not None else "")
    names = [parameter.name for parameter in entry.parameters]
    assert [name for name in names if not re.search(rf"`{name}\b", said)] == []


@pytest.mark.parametrize("entry", OWNERS.values(), ids=lambda entry: entry.name)
def test_the_docstring_of_a_class_names_every_field(entry: Entry) -> None:
    shown = {member.name.rpartition(".")[2] for member in members(entry.object)}
    fields = [name for name in attributes(entry.object) if name not in shown]
    assert [name for name in fields if not re.search(rf"`{name}\b", entry.text)] == []


def test_the_example_in_the_package_s_own_docstring_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples")
    model, (tokens, targets) = gpt.build()
    code = textwrap.dedent("\n".join(re.findall(r"^ {4}.*$", mw.__doc__ or "", re.M)))
    found = {"torch": torch, "meshwright": mw, "model": model, "tokens": tokens, "targets": targets}
    exec(code, found)
    torch.testing.assert_close(found["loss"], model(tokens, targets).detach())


# -- what is raised ---------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).square().mean()


class Branch(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum() if x.sum() > 0 else super().forward(x)


class Sorted(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).sort(-1).values).sum()


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


PLAN = "mesh dp=2, tp=2\ndata x over dp\ncolumns up over tp\nrows down over tp"
X = torch.ones(4, 4)


def compiled(model: nn.Module | None = None, plan: str = PLAN, rows: int = 4) -> mw.Program:
    return mw.compile(model or MLP(), mw.Plan.parse(plan), (torch.ones(rows, 4),))


@functools.cache
def program() -> mw.Program:
    return compiled()


def launched() -> mw.Run:
    return program().launch()


def differing() -> None:
    run = launched()
    next(run.parameters()).data.add_(1)
    run.check()


def not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    run = launched()
    monkeypatch.setattr(mw.Run, "data_ranks", 2)
    run.data_slice(3)


def gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allow, "LIMIT", 0)
    compiled(Sorted())


def unfit(run: mw.Run) -> None:
    run.load_state_dict({"up.weight": torch.ones(1)})


def half_a_name() -> None:
    launched().optimizer(torch.optim.SGD, groups=[{"params": ["upp.*"]}])


def failed_save(monkeypatch: pytest.MonkeyPatch) -> mw.Run:
    def full(*_: object) -> None:
        raise mw.RunError("the disk is full")

    monkeypatch.setattr(saving, "write_shard", full)
    run = launched()
    run.save("folder", wait=False)
    return run


def delinked(plan: str) -> None:
    run = compiled(Deep(), "mesh one=1\nshare layers.*").launch()
    run.delink(plan=mw.Plan.parse(plan))


RAISED: Mapping[tuple[str, str], Callable[[], object] | Callable[[pytest.MonkeyPatch], object]] = {
    ("meshwright.compile", "PlanError"): lambda: compiled(plan="mesh tp=2\ncolumns u over tp"),
    ("meshwright.compile", "CaptureError"): lambda: compiled(Branch()),
    ("meshwright.compile", "LayoutError"): gathering,
    ("Plan.parse", "PlanError"): lambda: mw.Plan.parse("mash dp=2"),
    ("Plan.load", "PlanError"): lambda: mw.Plan.load("no such file"),
    ("Program.graph", "KeyError"): lambda: program().graph("stage1.forward"),
    ("Program.explain", "PlanError"): lambda: program().explain("u"),
    ("Program.cost", "CompilerError"): lambda: program().cost("no such cluster"),
    ("Program.cost", "PlanError"): lambda: program().cost(names={"x": "[b"}),
    ("Cost.memory", "CompilerError"): lambda: program().cost().memory("all"),
    ("Cluster.load", "CompilerError"): lambda: Cluster.load("no such cluster"),
    ("Cluster.parse", "CompilerError"): lambda: Cluster.parse("[device]"),
    ("Program.schedule", "CompilerError"): lambda: program().schedule(costs={"forward": 1}),
    ("Program.schedule", "PlanError"): lambda: program().schedule(ranks=0),
    ("Program.delinked", "CompilerError"): lambda: program().delinked(),
    ("Program.delinked", "PlanError"): lambda: delinked("mesh tp=2\ncolumns u over tp"),
    ("Program.launch", "RunError"): lambda: program().launch(new_shapes="all"),
    ("Run.step", "RunError"): lambda: launched().step(torch.ones(2, 4)),
    ("Run.step_local", "RunError"): lambda: launched().step_local(torch.ones(2, 4)),
    ("Run.evaluate", "PlanError"): lambda: launched().evaluate(torch.ones(3, 4)),
    ("Run.forward", "PlanError"): lambda: launched().forward(torch.ones(3, 4)),
    ("Run.data_slice", "RunError"): not_divided,
    ("Run.optimizer", "RunError"): lambda: launched().optimizer(torch.optim.SGD, rate=1.0),
    ("Run.optimizer", "PlanError"): half_a_name,
    ("Run.load_state_dict", "RunError"): lambda: unfit(launched()),
    ("Run.copy_to", "RunError"): lambda: launched().copy_to(nn.Linear(4, 4)),
    ("Run.clip_grad_norm_", "RunError"): lambda: launched().clip_grad_norm_(-1.0),
    ("Run.delink", "RunError"): lambda: launched().delink(),
    ("Run.delink", "PlanError"): lambda: delinked("mesh tp=2\ncolumns u over tp"),
    ("Run.check", "MismatchError"): differing,
    ("Run.save", "RunError"): lambda: launched().save(__file__),
    ("Run.wait_saved", "RunError"): lambda monkeypatch: failed_save(monkeypatch).wait_saved(),
    ("Run.close", "RunError"): lambda monkeypatch: failed_save(monkeypatch).close(),
    ("Run.load", "RunError"): lambda: launched().load("no such folder"),
    ("meshwright.read_state_dict", "RunError"): lambda: mw.read_state_dict("no such folder"),
}
"""A case for each error that an entry says it raises."""


def said_to_be_raised() -> set[tuple[str, str]]:
    """The errors after `Raises` in the docstrings of functions, with the entry."""
    found = set()
    for entry in FUNCTIONS:
        for sentence in re.findall(r"Raises\s+(.*?)(?:\.\s|\.$)", entry.text + "\n", re.S):
            found |= {(entry.name, name) for name in re.findall(r"`(\w+Error)`", sentence)}
    return found


def test_every_error_that_a_docstring_names_has_a_case() -> None:
    assert said_to_be_raised() == set(RAISED)


@pytest.mark.parametrize(("name", "error"), RAISED, ids=str)
def test_what_is_said_to_be_raised_is(
    name: str, error: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    case = RAISED[name, error]
    takes_patches = bool(inspect.signature(case).parameters)
    with pytest.raises(Exception) as caught:  # the name is compared
        case(monkeypatch) if takes_patches else case()  # type: ignore[call-arg]
    assert error in [kind.__name__ for kind in caught.type.__mro__], repr(caught.value)

"""Two axes against one, as the Optimus paper compares them: `examples/optimus`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

import meshwright as mw
from examples.optimus import __main__ as command
from examples.optimus import measure, paper
from examples.optimus.model import Setting
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.report.memory.tensors import Use

SMALL = Setting(4, 4096, 64, layers=2, length=128)
"""Wide, so that what norms save of each token does not count."""
BATCH = 64


def sized(ranks: int, **changes: int) -> Setting:
    return replace(SMALL, ranks=ranks, **changes)


@pytest.mark.parametrize("form", ["1-D", "2-D"])
@pytest.mark.parametrize("ranks", [4, *(pytest.param(p, marks=pytest.mark.slow) for p in (16, 64))])
def test_a_layer_sends_what_the_paper_counts(ranks: int, form: str) -> None:
    """With recomputation, less what nothing takes."""
    setting = sized(ranks)
    counted = measure.volumes(setting, form, BATCH)
    expected = {p: paper.elements(form, p, setting, BATCH, tree=False) for p in paper.PARTS}
    expected["with recomputation"] -= paper.unused(form, setting, BATCH, tree=False)
    assert counted == pytest.approx(expected, rel=1e-12)


def held(program: mw.Program) -> int:
    """The bytes at the peak of a step that are no states."""
    memory = program.memory()
    states = (Use.PARAMETERS, Use.OPTIMIZER, Use.GRADIENTS)
    return memory.peak - sum(memory.parts.get(use.value, 0) for use in states)


@pytest.mark.slow
def test_what_activations_take_falls_as_the_number_of_ranks() -> None:
    """Saved are a checkpoint of each layer, what enters the last norm and leaves it, and logits. On
    four ranks one of the two panels that are held is often a rank's own, so that it needs less."""
    programs = {ranks: sized(ranks).compiled("2-D", BATCH) for ranks in (4, 16, 64)}
    sizes = (SMALL.layers + 2) * SMALL.width + SMALL.vocabulary
    for ranks, program in programs.items():
        expected = 4 * BATCH * SMALL.length * sizes / ranks
        assert program.memory().activations == pytest.approx(expected, rel=0.02)
    assert held(programs[64]) * 64 == pytest.approx(held(programs[16]) * 16, rel=0.1)
    assert held(programs[4]) * 4 < held(programs[16]) * 16


def buffers(program: mw.Program, phase: Phase, op: str) -> float:
    """What the products of a block give of activations, `[b, s, ...]`, in units of b s h / p."""
    graph = program.stages[0].graphs[phase]
    own = [n for n in graph.nodes if str(n.op) == op and n.origin.module.startswith("blocks.1.")]
    inner = {operand for node in own for operand in node.operands()}
    sizes = (
        math.prod(n.placed.local_shape(graph.mesh))
        for n in own
        if n not in inner and len(n.tensor.shape) == 3
    )
    return sum(sizes) * program.mesh.num_ranks / (BATCH * SMALL.length * SMALL.width)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 16, 64])
def test_the_buffers_of_a_layer_are_those_of_the_paper(ranks: int) -> None:
    """9 b s h / p of results forward and 7 b s h / p of cotangents backward; a layer more is one
    checkpoint more, b s h / p."""
    two, three = (sized(ranks, layers=layers).compiled("2-D", BATCH) for layers in (2, 3))
    plain = sized(ranks).compiled("2-D", BATCH, checkpoint=False)
    assert buffers(plain, Phase.FORWARD, "mesh::add_panel_product") == 9
    assert buffers(plain, Phase.BACKWARD, "mesh::put_block") == 7
    more = three.memory().activations - two.memory().activations
    checkpoint = 4 * BATCH * SMALL.length * SMALL.width
    assert checkpoint <= more * ranks < 1.1 * checkpoint


@pytest.mark.slow
def test_the_work_grows_as_the_paper_says() -> None:
    share = 384 / 8192
    flat, grid = (measure.isoefficiency(form, command.RANKS, share) for form in command.FORMS)
    assert flat.exponent == pytest.approx(3, abs=0.1)
    assert grid.exponent == pytest.approx(3, abs=0.1)
    assert max(flat.residual, grid.residual) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("form", ["1-D", "2-D"])
def test_formulas_of_four_ranks_hold_for_sixteen(form: str) -> None:
    few, many = Setting(4, 64, 8, 3, 96, 512), Setting(16, 128, 32, 3, 96, 32)
    formulas, counted = (measure.formulas(each, form, 16) for each in (few, many))
    sizes = {**counted.values, "b": 16, "s": 32, "h": 128, "layers": 3}
    for of in ("sent", "flops"):
        formula, number = (getattr(each, of)(module="blocks.*") for each in (formulas, counted))
        assert formula.at(sizes) == number.number


@pytest.mark.slow
@pytest.mark.parametrize("form", ["1-D", "2-D"])
def test_from_three_layers_on_each_takes_as_long(form: str) -> None:
    times = [
        sized(4, layers=layers)
        .compiled(form, 8)
        .cost(measure.CLUSTER, convention=measure.CONVENTIONS[form][0])
        .seconds
        for layers in (measure.SHALLOW, measure.SHALLOW + 1, measure.SHALLOW + 3)
    ]
    assert times[2] - times[1] == pytest.approx(2 * (times[1] - times[0]), rel=1e-9)


@dataclass(frozen=True)
class Peaks:
    """In the place of a setting and its programs: a peak that is somewhere else above 70."""

    batch: int = 0
    side: int = 4

    def compiled(self, form: str, batch: int) -> Peaks:
        return replace(self, batch=batch)

    def memory(self) -> SimpleNamespace:
        parts = {"parameters": 100, "optimizer": 200}
        return SimpleNamespace(peak=max(300 + 5 * self.batch, 160 + 7 * self.batch),
                               peak_at="", parts=parts)  # fmt: skip


@pytest.mark.parametrize(("limit", "batch"), [(449, 28), (650, 68), (660, 68), (859, 96)])
@pytest.mark.parametrize("guess", [3, 64, 400])
def test_a_search_ends_between_a_batch_that_fits_and_one_that_does_not(
    limit: int, batch: int, guess: int
) -> None:
    said: list[str] = []
    found = measure.largest_batch(Peaks(), "2-D", limit, guess, said.append)
    assert found.batch == batch
    assert found.peak <= limit < found.above
    assert len(said) < 9


@pytest.mark.slow
def test_the_largest_batch_grows_as_in_the_paper() -> None:
    found = {
        form: measure.largest_batch(
            command.LARGE, form, command.LIMIT, command.GUESSES[form], lambda text: None
        )
        for form in command.FORMS
    }
    assert 7 <= found["2-D"].batch / found["1-D"].batch <= 9


def test_without_matplotlib_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find: Callable[..., object] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(SystemExit):
        command.main(["--picture", "a.png"])
    assert "pip install 'meshwright[picture]'" in capsys.readouterr().err

"""Every example runs and learns, and its plan is in canonical form."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

import meshwright as mw

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_learns_on_the_virtual_mesh(name: str) -> None:
    losses = load(name).main(steps=12)
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("plan", sorted(EXAMPLES.rglob("*.plan")), ids=lambda path: path.stem)
def test_the_plan_of_an_example_is_in_canonical_form(plan: Path) -> None:
    assert mw.Plan.load(plan).format() == plan.read_text(encoding="utf-8")


def test_a_resumed_training_has_the_losses_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    train = load("train")
    whole = train.main(steps=6)
    begun = train.main(steps=3, folder=tmp_path, save_every=3)
    assert begun + train.main(steps=6, folder=tmp_path) == whole
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved.keys() == train.Classifier().state_dict().keys()


@pytest.mark.slow
def test_an_interrupted_training_goes_on_with_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = load("train_gpt")
    whole = train.main(steps=6)
    assert "held out" in capsys.readouterr().out

    def interrupted(text: torch.Tensor, number: int, *rows: slice) -> object:
        if number == 5:
            raise KeyboardInterrupt
        return train.batch(text, number, *rows)

    stopped = load("train_gpt")
    monkeypatch.setattr(stopped, "batch", interrupted)
    monkeypatch.setattr(stopped, "FIRST", False)
    with pytest.raises(KeyboardInterrupt):
        stopped.main(steps=6, folder=tmp_path, every=2)
    assert capsys.readouterr().out == ""
    assert train.main(steps=6, folder=tmp_path) == whole[4:]


def test_the_same_training_runs_in_a_pipeline() -> None:
    train = load("train_gpt")
    plan = Path(train.__file__).with_name("train_gpt_pipeline.plan")
    torch.testing.assert_close(train.main(steps=2, plan=plan), train.main(steps=2))

"""An optimizer over the compiled model's own parameters is told apart from all others."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.runtime.optimizers import model_optimizers
from tests.runtime.models import PLANS, batch, make


def launched(model: nn.Module) -> mw.Run:
    return mw.compile(model, mw.Plan.parse(PLANS["tensor"]), batch()).launch()


def test_an_optimizer_over_the_compiled_models_parameters_says_that_it_changes_nothing() -> None:
    model = make()
    early = torch.optim.AdamW(model.parameters())
    run = launched(model)
    for optimizer in (early, torch.optim.AdamW(model.parameters())):
        run.step(*batch())
        with pytest.raises(mw.RunError) as caught:
            optimizer.step()
        assert str(caught.value) == (
            "this `AdamW` changes nothing: it holds parameters of the model that was compiled, "
            "and a run trains shards of its own\n"
            "  without a gradient: `spare` and 13 more\n"
            "  help: make it with `run.optimizer(AdamW, ...)`"
        )
    run.optimizer(torch.optim.AdamW).step()
    torch.optim.SGD(run.parameters(), lr=0.1).step()


def test_other_models_and_the_compiled_one_trained_in_eager_mode_are_left_alone() -> None:
    model, other = make(), make(1)
    launched(model)
    for each in (model, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(*batch())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.step()


def test_neither_model_nor_optimizer_is_kept_alive() -> None:
    model = make()
    run = launched(model)
    optimizer = torch.optim.SGD(run.parameters(), lr=0.1)
    optimizer.step()
    kept = [weakref.ref(each) for each in (model, optimizer, *model.parameters())]
    before = len(model_optimizers._launched)
    del run, optimizer, model
    gc.collect()
    assert [each() for each in kept] == [None] * len(kept)
    assert len(model_optimizers._launched) < before

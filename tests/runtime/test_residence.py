"""What a run keeps in memory: its own shards, and nothing of the model that was compiled."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from types import MethodType
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw
from meshwright.runtime.run import Run

PLAN = "mesh dp=2, tp=2\ndata x, y over dp\ncolumns up over tp\nrows down over tp"


class MLP(nn.Module):
    """Tied, buffered, with a tensor that is neither parameter nor buffer, and modes that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.again = self.up
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.rand(16) + 1)
        self.shift = torch.randn(16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.drop(F.relu(self.up(x)) + self.again(x))
        return F.mse_loss(self.down(hidden) * self.scale + self.shift, y)


def batch(rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, 16, generator=generator, dtype=torch.float64),
        torch.randn(rows, 16, generator=generator, dtype=torch.float64),
    )


def made() -> MLP:
    torch.manual_seed(0)
    model = MLP().double()
    model.shift = model.shift.double()
    return model


def launched(model: nn.Module) -> Run:
    run: Run = mw.compile(model, mw.Plan.parse(PLAN), batch(), device="cpu").launch()
    return run


def trained(run: Run) -> Run:
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    run.step(*batch())
    optimizer.step()
    return run


def test_a_model_that_is_dropped_goes_and_the_run_compiles_for_other_modes_and_shapes() -> None:
    model = made()
    reference, kept = copy.deepcopy(model).eval(), ref(model.up.weight)
    run = trained(launched(model))
    del model
    gc.collect()
    assert kept() is None
    run.copy_to(reference)
    for rows in (8, 4):
        assert torch.allclose(run.evaluate(*batch(rows)), reference(*batch(rows)))


def test_what_was_compiled_later_does_not_keep_the_model_either() -> None:
    model = made()
    run, kept = launched(model), ref(model.up.weight)
    run.evaluate(*batch())
    run.forward(*batch(4))
    del model
    gc.collect()
    assert kept() is None


def test_after_a_step_one_copy_of_the_weights_is_left_and_what_training_needs() -> None:
    gc.collect()
    before = _storages()
    run = launched(made())
    optimizer = run.optimizer(torch.optim.AdamW)
    run.step(*batch())
    optimizer.step()
    gc.collect()
    found = sum(size for place, size in _storages().items() if place not in before)
    memory = run.program.memory()
    states = memory.parameters + memory.buffers + memory.gradients + memory.optimizer
    assert 1 <= found / len(run.states) / states <= 1.05


def _storages() -> dict[int, int]:
    """Bytes of each storage with values that a tensor holds, by its address."""
    tensors = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    storages = [each.untyped_storage() for each in tensors if each.device.type == "cpu"]
    return {each.data_ptr(): each.nbytes() for each in storages if each.nbytes() > 8}


def test_a_model_that_is_kept_stays_as_it_was_and_can_be_launched_again() -> None:
    model = made()
    before = copy.deepcopy(model.state_dict())
    program = mw.compile(model, mw.Plan.parse(PLAN), batch(), device="cpu")
    trained(program.launch()).evaluate(*batch(4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model.training
    first = program.launch(seed=1).step(*batch())
    assert torch.equal(program.launch(seed=1).step(*batch()), first)


def test_a_program_launches_again_when_the_model_has_no_other_name() -> None:
    program = mw.compile(made(), mw.Plan.parse(PLAN), batch(), device="cpu")
    first = program.launch(seed=1).step(*batch())
    gc.collect()
    assert torch.equal(program.launch(seed=1).step(*batch()), first)


def test_the_program_of_a_run_reports_the_same_and_has_no_weights_to_launch_with() -> None:
    program = mw.compile(made(), mw.Plan.parse(PLAN), batch(), device="cpu")
    own = program.launch().program
    assert own.to_json() == program.to_json()
    assert str(own.explain("")) == str(program.explain(""))
    assert (repr(own), own.digest) == (repr(program), program.digest)
    with pytest.raises(mw.RunError, match="meta device"):
        own.launch()
    weights = program.model.state_dict()
    started = own.launch(state_dict=weights)
    assert torch.equal(started.step(*batch()), program.launch().step(*batch()))


def locked(model: MLP) -> None:
    model.lock = threading.Lock()  # type: ignore[assignment]  # nothing copies a lock


def bound(model: MLP) -> None:
    model.down.forward = MethodType(nn.Linear.forward, model.down)  # type: ignore[method-assign]


def closed_over(model: MLP) -> None:
    whole = model.down.forward
    model.down.forward = lambda x: whole(x)  # type: ignore[method-assign]


@pytest.mark.parametrize("patch", [locked, bound])
def test_models_that_are_patched_are_compiled_with_the_weights_of_the_run(
    patch: Callable[[MLP], None],
) -> None:
    model, reference = made(), made().eval()
    patch(model)
    run = trained(launched(model))
    del model
    gc.collect()
    run.copy_to(reference)
    assert torch.allclose(run.evaluate(*batch()), reference(*batch()))


def test_a_function_that_keeps_a_module_of_a_model_that_is_gone_is_refused() -> None:
    model = made()
    closed_over(model)
    run = trained(launched(model))
    assert run.evaluate(*batch()) > 0
    del model
    gc.collect()
    with pytest.raises(mw.CaptureError, match=r"keeps `down.weight` as it was before training"):
        run.evaluate(*batch(4))

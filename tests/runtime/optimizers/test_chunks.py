"""Updates in chunks: what torch does in one step, hooks and counts included."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import meshwright as mw
from meshwright.runtime.offloading import disk
from meshwright.runtime.optimizers import chunks

DATA = "mesh dp=2\ndata x over dp\n"
AWAY = "offload parameters first\noffload optimizer\n"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).square().mean()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk for each parameter."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)


def launched(plan: str) -> mw.Run:
    torch.manual_seed(0)
    run: mw.Run = mw.compile(Two(), mw.Plan.parse(DATA + plan), batch()).launch()
    return run


def batch() -> tuple[Tensor]:
    return (torch.linspace(-1, 1, 128).view(4, 32),)


def updated(run: mw.Run, optimizer: Optimizer, steps: int = 3) -> dict[str, Tensor]:
    for _ in range(steps):
        run.step(*batch())
        optimizer.step()
        optimizer.zero_grad()
    return run.state_dict()


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(ours[name].equal(theirs[name]) for name in theirs)


class Counting(Optimizer):
    """Decays its rate by the number of updates, which it keeps in its groups."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "updates": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["updates"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"] / group["updates"])


def test_what_an_optimizer_counts_in_its_groups_it_counts_once() -> None:
    found = []
    for plan in ("", AWAY):
        with launched(plan) as run:
            optimizer = run.optimizer(Counting, groups=[{"params": ["second.*"], "lr": 0.2}])
            found.append(updated(run, optimizer))
            assert [group["updates"] for group in optimizer.param_groups] == [3, 3]
    assert equal(*found)


def test_an_update_without_gradients_counts_in_groups_too() -> None:
    for plan in ("", AWAY):
        with launched(plan) as run:
            optimizer = run.optimizer(Counting, groups=[{"params": ["*.weight"]}])
            updated(run, optimizer, 2)
            optimizer.step()
            assert [group["updates"] for group in optimizer.param_groups] == [3, 3]


def test_a_chunk_is_updated_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []

    class Noting(Counting):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            updates.append(sum(p.nbytes for group in self.param_groups for p in group["params"]))
            super().step(closure)

    large, small = 32 * 32 * 4, 32 * 4
    with launched("offload parameters\n") as run:
        optimizer = run.optimizer(Noting)
        updates.clear()
        for full in (large, large + 1):
            monkeypatch.setattr(chunks, "CHUNK_BYTES", full)
            updated(run, optimizer, 1)
        optimizer.step()
    # First what is on the device, then the chunks of two ranks that have gradients.
    stay = [4 * small]
    assert updates == [*stay, *4 * [large], *stay, *2 * [2 * large], *stay]


def resident(folder: Path) -> int:
    """The bytes of files in a folder that this process has mapped and that are in memory."""
    size, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            within = str(folder) in line
        elif within and line.startswith("Rss:"):
            size += int(line.split()[1]) << 10
    return size


@pytest.mark.parametrize("line", ["", "offload optimizer\n"])
def test_files_are_read_a_chunk_ahead_and_are_not_in_memory_afterwards(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, update, ahead = list[str](), chunks.Chunks._of, chunks.Chunks._ahead

    def noting(self: Any, chunk: Any, *args: Any, **options: Any) -> None:
        update(self, chunk, *args, **options)
        order.append("updated" if resident(tmp_path) else "nothing in files is")

    def noting_ahead(self: Any, chunk: Any) -> None:
        order.append("read")
        ahead(self, chunk)

    monkeypatch.setattr(chunks.Chunks, "_of", noting)
    monkeypatch.setattr(chunks.Chunks, "_ahead", noting_ahead)
    with launched(f'offload parameters *.weight to=disk path="{tmp_path}"\n{line}') as run:
        optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
        run.step(*batch())
        order.clear()
        optimizer.step()
        for state in run.states:
            state.stores(str(tmp_path))._threads.shutdown(wait=True)  # type: ignore[union-attr]
        assert not resident(tmp_path)
    assert order == ["read", order[1], *3 * ["read", "updated"], "updated"]


def test_hooks_run_once_in_a_step_and_before_anything_is_updated() -> None:
    def doubled(optimizer: Optimizer, *_: Any) -> None:
        calls.append("before")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(2)

    found, calls = [], list[str]()
    for plan in ("", AWAY):
        with launched(plan) as run:
            optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
            optimizer.register_step_pre_hook(doubled)
            optimizer.register_step_post_hook(lambda *_: calls.append("after"))
            found.append(updated(run, optimizer))
            assert [state.num_updates for state in run.states] == [3, 3]
    assert equal(*found)
    assert calls == ["before", "after"] * 6


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    found, losses = [], list[Tensor]()
    for plan in ("", AWAY):
        with launched(plan) as run:
            optimizer = run.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)

            def closure(run: mw.Run = run, optimizer: Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = run.step(*batch())
                assert torch.is_grad_enabled()
                return loss

            with torch.no_grad():
                losses += [optimizer.step(closure) for _ in range(3)]
            found.append(run.state_dict())
            assert run.states[0].random.step == 3
    assert equal(*found)
    assert all(a.equal(b) for a, b in zip(losses[:3], losses[3:], strict=True))


def test_gradients_may_be_others_than_those_of_the_step(tmp_path: Path) -> None:
    found = []
    for plan in ("", AWAY, f'offload parameters to=disk path="{tmp_path}"\n'):
        with launched(plan) as run:
            optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
            for _ in range(2):
                run.step(*batch())
                for parameter in run.parameters():
                    assert parameter.grad is not None
                    parameter.grad = parameter.grad.clone() * 3
                optimizer.step()
            found.append(run.state_dict())
    assert equal(found[1], found[0]) and equal(found[2], found[0])


def test_values_that_are_loaded_are_those_that_are_updated() -> None:
    found = []
    for plan in ("", AWAY):
        with launched(plan) as run:
            optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
            updated(run, optimizer, 1)
            run.load_state_dict({n: torch.ones_like(t) for n, t in run.state_dict().items()})
            found.append(updated(run, optimizer, 1))
    assert equal(*found)


def multiplied(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(0.5)


def multiplied_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(0.5)


def assigned_data(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 0.5


@pytest.mark.parametrize("write", [multiplied, multiplied_data, assigned_data])
def test_what_is_written_to_a_parameter_is_what_steps_take_and_updates_begin_from(
    write: Callable[[nn.Parameter], None], tmp_path: Path
) -> None:
    disk, found = f'offload optimizer to=disk path="{tmp_path}"\n', []
    for plan in ("", AWAY, disk):
        with launched(plan) as run:
            optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
            updated(run, optimizer, 1)
            whole = run.state_dict()
            for parameter in run.parameters():
                write(parameter)
            found.append({**run.state_dict(), "loss": run.step(*batch())})
            assert equal(found[-1], {name: each * 0.5 for name, each in whole.items()})
            optimizer.step()
            found[-1] |= {f"{name} later": each for name, each in run.state_dict().items()}
    assert equal(found[1], found[0]) and equal(found[2], found[0])


def test_data_that_is_held_is_still_followed_when_it_is_written_later() -> None:
    with launched(AWAY) as run:
        held = [parameter.data for parameter in run.parameters()]
        run.step(*batch())
        for data in held:
            data.zero_()
        assert run.step(*batch()) == 0


def test_the_state_of_an_optimizer_is_where_the_plan_says(tmp_path: Path) -> None:
    with launched(f'offload optimizer to=disk path="{tmp_path}"\n') as run:
        optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
        updated(run, optimizer, 1)
        store = run.states[0].stores(str(tmp_path))
        parameter = run.states[0].parameters["first.weight"]
        assert store.has(parameter.data) and store.has(optimizer.state[parameter]["exp_avg"])
        assert not store.has(run.states[0].tensors["parameter", "first.weight"])
        kept = optimizer.state_dict()
        optimizer.load_state_dict(kept)
        updated(run, optimizer, 1)
        assert store.has(optimizer.state[parameter]["exp_avg"])


def test_files_that_cannot_be_read_stop_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with launched(f'offload parameters to=disk path="{tmp_path}"\n') as run:
        optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
        run.step(*batch())
        monkeypatch.setattr(disk.Mapping, "populate", broken)
        with pytest.raises(mw.RunError, match=r"cannot read .*Input/output error") as caught:
            optimizer.step()
        assert "load a checkpoint" in "".join(caught.value.__notes__)


def test_files_that_cannot_be_written_stop_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with launched(f'offload parameters to=disk path="{tmp_path}"\n') as run:
        optimizer = run.optimizer(torch.optim.AdamW, lr=0.1)
        run.step(*batch())
        with monkeypatch.context() as patched:
            patched.setattr(disk.Mapping, "flush", full)
            optimizer.step()
            with pytest.raises(mw.RunError, match=r"cannot write .*No space left"):
                run.step(*batch())


@pytest.mark.parametrize("kind", [torch.optim.LBFGS])
def test_an_optimizer_that_looks_at_all_tensors_together_is_refused(
    kind: Any, golden: Callable[[str, str], None]
) -> None:
    plan = mw.Plan.parse("mesh one=1\n" + AWAY)
    with mw.compile(Two(), plan, batch()).launch() as run:
        with pytest.raises(mw.RunError) as caught:
            run.optimizer(kind, lr=0.1)
        golden("chunks-of-lbfgs", str(caught.value))

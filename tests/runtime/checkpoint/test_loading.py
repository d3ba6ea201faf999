"""A load takes over all of a checkpoint that fits, or nothing, and says what does not fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import meshwright as mw
from meshwright.runtime.checkpoint import folder, loading, optimizer_loading
from meshwright.runtime.checkpoint.folder import OpenSave
from meshwright.runtime.checkpoint.manifest import Manifest
from meshwright.runtime.checkpoint.parts import read_whole
from tests.runtime.checkpoint.test_checkpoint import ADAMW, compiled, equal, launched, train
from tests.runtime.models import batch

Change = Callable[[Manifest], Manifest]
GROUPS = [{"params": ["**.bias"], "weight_decay": 0.0}]


def adamw(run: mw.Run) -> torch.optim.Optimizer:
    return run.optimizer(torch.optim.AdamW, groups=GROUPS, **ADAMW)


def held(run: mw.Run, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a load may change, rank by rank."""
    found: dict[str, Any] = {"groups": copy.deepcopy(options(optimizer))}
    for state in run.states:
        found[f"{state.rank} random"] = (state.random.seed, state.random.step)
        for which, tensor in state.tensors.items():
            found[f"{state.rank} {which}"] = tensor.clone()
        for name, parameter in state.parameters.items():
            kept = optimizer.state.get(parameter, {})
            found |= {f"{state.rank} {name} {key}": copy.deepcopy(kept[key]) for key in kept}
    return found


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def alike(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)

    return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)


def pair(path: Path, plan: str = "both") -> tuple[mw.Run, torch.optim.Optimizer, dict[str, Any]]:
    """A checkpoint, and a run that was trained otherwise, with what it holds."""
    run = launched(plan, seed=1)
    optimizer = adamw(run)
    train(run, optimizer, 0, 2)
    run.save(path, optimizer)
    other = compiled(plan).launch(seed=5)
    theirs = adamw(other)
    train(other, theirs, 5, 1)
    return other, theirs, held(other, theirs)


def failing(module: Any, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Let the first or last tensor that a rank reads fail, or one of the last rank only."""
    original, calls = module.read_into, {"count": 0}

    def read_into(*given: Any) -> None:
        state = given[-1]
        calls["count"] += 1
        last = state.rank == state.mesh.num_ranks - 1
        entry = given[0]
        if (
            (place == "first" and calls["count"] == 1)
            or (place == "last" and entry.name == "scratch" and last)
            or (place == "of one rank" and last)
        ):
            raise mw.RunError("a bad sector", help="replace the disk")
        original(*given)

    monkeypatch.setattr(module, "read_into", read_into)


def test_a_load_that_fails_anywhere_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, optimizer, before = pair(tmp_path)
    for place in ("first", "last", "of one rank", "in the optimizer", "options"):
        with monkeypatch.context() as patched:
            if place == "options":
                edit(patched, lambda manifest: with_option(manifest, "lr", "fast", group=1))
            elif place == "in the optimizer":
                failing(optimizer_loading, patched, "of one rank")
            else:
                failing(loading, patched, place)
            with pytest.raises(mw.RunError) as caught:
                run.load(tmp_path, optimizer)
        assert same(held(run, optimizer), before), place
        if place in ("last", "in the optimizer"):
            assert str(caught.value) == "on rank 3: a bad sector\n  help: replace the disk"
    run.load(tmp_path, optimizer)
    assert not same(held(run, optimizer), before)
    train(run, optimizer, 0, 1)
    run.check(optimizer)


def edit(patched: pytest.MonkeyPatch, change: Change) -> None:
    """Let the manifest of the next load be another, as if it had been written so."""
    original = folder.parse_manifest
    patched.setattr(folder, "parse_manifest", lambda *given: change(original(*given)))


def with_option(manifest: Manifest, name: str, value: Any, group: int = 0) -> Manifest:
    saved = copy.deepcopy(manifest.optimizer)
    assert saved is not None
    saved["groups"][group][name] = value
    return replace(manifest, optimizer=saved)


def without_option(manifest: Manifest, name: str) -> Manifest:
    found = with_option(manifest, name, None)
    assert found.optimizer is not None
    del found.optimizer["groups"][0][name]
    return found


def with_entry(manifest: Manifest, change: Callable[[dict[str, Any]], Any]) -> Manifest:
    saved = copy.deepcopy(manifest.optimizer)
    assert saved is not None
    change(saved)
    return replace(manifest, optimizer=saved)


def without(manifest: Manifest, name: str) -> Manifest:
    return replace(manifest, tensors={n: t for n, t in manifest.tensors.items() if n != name})


def renamed(manifest: Manifest, name: str, new: str) -> Manifest:
    return replace(
        manifest,
        tensors={new if n == name else n: t for n, t in manifest.tensors.items()},
        aliases={**manifest.aliases, new: new},
    )


def of(manifest: Manifest, name: str, **fields: Any) -> Manifest:
    changed = replace(manifest.tensors[name], **fields)
    return replace(manifest, tensors={**manifest.tensors, name: changed})


BIAS = "blocks.0.up.bias"
CHANGES: dict[str, Change] = {
    "a parameter missing": lambda m: without(m, BIAS),
    "a buffer missing": lambda m: without(m, "steps"),
    "a buffer missing that no state_dict has": lambda m: without(m, "scratch"),
    "a parameter under another name": lambda m: renamed(m, BIAS, "blocks.0.up.biases"),
    "a tensor that no name leads to": lambda m: replace(
        m, tensors={**m.tensors, "left over": m.tensors[BIAS]}
    ),
    "an alias that leads nowhere": lambda m: replace(
        m, aliases={**m.aliases, "head.weight": "nowhere"}
    ),
    "tied weights apart": lambda m: replace(
        m,
        tensors={**m.tensors, "head.weight": m.tensors["wte.weight"]},
        aliases={**m.aliases, "head.weight": "head.weight"},
    ),
    "another shape": lambda m: of(m, "spare", shape=(2,)),
    "another dtype": lambda m: of(of(m, BIAS, dtype="int64"), "steps", dtype="float32"),
    "another dtype than in the file": lambda m: of(m, BIAS, dtype="float32"),
    "an optimizer's tensor missing": lambda m: without(m, f"optimizer/exp_avg/{BIAS}"),
    "an optimizer's step missing": lambda m: without(m, f"optimizer/step/{BIAS}"),
    "an optimizer's tensor unknown": lambda m: replace(
        m, tensors={**m.tensors, f"optimizer/more/{BIAS}": m.tensors[BIAS]}
    ),
    "an optimizer's number unknown": lambda m: with_entry(
        m, lambda saved: saved["numbers"].update({BIAS: {"more": 1}})
    ),
    "a number where others have a tensor": lambda m: with_entry(
        without(m, f"optimizer/exp_avg/{BIAS}"),
        lambda saved: saved["numbers"].update({BIAS: {"exp_avg": 3}}),
    ),
    "a name without an alias": lambda m: replace(
        m, aliases={n: own for n, own in m.aliases.items() if n != BIAS}
    ),
    "state of a parameter of no group": lambda m: with_entry(
        m, lambda saved: saved["groups"][0]["names"].remove(BIAS)
    ),
    "a parameter in two groups": lambda m: with_entry(
        m, lambda saved: saved["groups"][1]["names"].append(BIAS)
    ),
    "a parameter twice in a group": lambda m: with_entry(
        m, lambda saved: saved["groups"][0]["names"].append(BIAS)
    ),
    "a parameter in another group": lambda m: with_entry(
        m,
        lambda saved: saved["groups"][1]["names"].append(saved["groups"][0]["names"].pop()),
    ),
    "an entry without groups": lambda m: with_entry(m, lambda saved: saved.pop("groups")),
    "another class": lambda m: with_entry(m, lambda saved: saved.update({"class": "Lion"})),
    "no optimizer": lambda m: replace(m, optimizer=None),
    "text for a number": lambda m: with_option(m, "lr", "fast"),
    "a list for a number": lambda m: with_option(m, "lr", [1e-3], group=1),
    "nan": lambda m: with_option(m, "weight_decay", math.nan),
    "infinity": lambda m: with_option(m, "lr", math.inf),
    "a number for a switch": lambda m: with_option(m, "amsgrad", 1),
    "a switch for a number": lambda m: with_option(m, "eps", True),
    "too short a list": lambda m: with_option(m, "betas", [0.9]),
    "text in a list": lambda m: with_option(m, "betas", [0.9, "0.999"]),
    "nothing for a number": lambda m: with_option(m, "lr", None),
    "a dictionary for a switch": lambda m: with_option(m, "maximize", {}),
    "text for a choice of this process": lambda m: with_option(m, "foreach", "yes"),
    "a text for what a scheduler adds": lambda m: with_option(m, "initial_lr", "x" * 100),
    "an unknown option": lambda m: with_option(m, "momentum", 0.9),
    "an option missing": lambda m: without_option(m, "amsgrad"),
}


def test_what_does_not_fit_is_named_before_anything_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    path = Path("checkpoint")
    monkeypatch.chdir(tmp_path)
    run, optimizer, before = pair(path, "tensor")
    lines: list[str] = []
    for name, change in CHANGES.items():
        with monkeypatch.context() as patched:
            edit(patched, change)
            try:
                run.load(path, optimizer)
                lines += [f"# {name}", "loaded"]
            except mw.RunError as error:
                lines += [f"# {name}", str(error)]
        assert same(held(run, optimizer), before), name
    golden("loading", "\n".join(lines))


def test_a_state_saved_before_the_first_step_clears_what_an_optimizer_keeps(
    tmp_path: Path,
) -> None:
    run = launched("tensor")
    optimizer = adamw(run)
    run.save(tmp_path, optimizer)
    start = held(run, optimizer)
    train(run, optimizer, 0, 2)
    run.load(tmp_path, optimizer)
    assert same(held(run, optimizer), start)
    train(run, optimizer, 0, 1)
    other = launched("tensor")
    theirs = adamw(other)
    train(other, theirs, 0, 1)
    assert equal(run, other)


def test_how_this_process_computes_is_not_a_checkpoints_to_say(tmp_path: Path) -> None:
    run = launched("tensor")
    run.save(tmp_path, run.optimizer(torch.optim.AdamW, foreach=True, lr=0.5))
    other = run.optimizer(torch.optim.AdamW, fused=True)
    run.load(tmp_path, other)
    group = other.param_groups[0]
    assert (group["fused"], group["foreach"], group["lr"]) == (True, None, 0.5)


@pytest.mark.parametrize("scheduled_first", [True, False])
def test_a_scheduler_is_made_before_a_load_or_after_it(
    tmp_path: Path, scheduled_first: bool
) -> None:
    run = launched("tensor")
    optimizer = adamw(run)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    train(run, optimizer, 0, 1)
    scheduler.step()
    run.save(tmp_path, optimizer)
    fresh = adamw(run)
    if scheduled_first:
        torch.optim.lr_scheduler.OneCycleLR(fresh, 0.3, total_steps=9)
    run.load(tmp_path, fresh)
    assert options(fresh) == options(optimizer)


def test_an_optimizer_of_some_of_the_parameters_is_resumed(tmp_path: Path) -> None:
    run = launched("both")
    names = ("blocks.1.up.weight", "wte.weight")
    chosen = [p for name, p in run.named_parameters() if name in names]
    optimizer = torch.optim.SGD(chosen, lr=0.1, momentum=0.9)
    train(run, optimizer, 0, 2)
    run.save(tmp_path, optimizer)
    before = held(run, optimizer)
    train(run, optimizer, 2, 2)
    after = held(run, optimizer)
    run.load(tmp_path, optimizer)
    assert same(held(run, optimizer), before)
    train(run, optimizer, 2, 2)
    assert same(held(run, optimizer), after)


def test_no_nan_is_saved_as_an_option(tmp_path: Path) -> None:
    run = launched("tensor")
    optimizer = adamw(run)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(mw.RunError, match="the optimizer's option `lr` is nan"):
        run.save(tmp_path, optimizer)
    assert run.step(*batch()).isfinite()


class Half(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)).sum()


def contents(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, those of its optimizer too."""
    with OpenSave.current(path) as opened:
        names = opened.manifest.tensors
        return {name: read_whole(name, opened.manifest, opened.shards) for name in names}


KEEPING = {
    "float32": (torch.float32, "mesh dp=1"),
    "masters": (torch.float32, "mesh dp=4\ndata x over dp\nzero 3 over dp\nprecision bf16"),
    "narrow masters": (
        torch.float32,
        "mesh dp=2\ndata x over dp\nzero 1 over dp\nprecision bf16 master=bf16",
    ),
    "narrow model": (torch.bfloat16, "mesh dp=2\ndata x over dp\nprecision bf16"),
    "bfloat16": (torch.bfloat16, "mesh tp=2\ncolumns up over tp\nrows down over tp"),
    "float64": (torch.float64, "mesh dp=2\ndata x over dp\nzero 2 over dp"),
}


def test_a_checkpoint_is_converted_to_the_types_of_the_run(tmp_path: Path) -> None:
    runs = {}
    for name, (dtype, plan) in KEEPING.items():
        x = torch.ones(4, 4, dtype=dtype)
        run = mw.compile(Half().to(dtype), mw.Plan.parse(plan), (x,)).launch(seed=1)
        optimizer = run.optimizer(torch.optim.AdamW, lr=0.01)
        for _ in range(2):
            run.step(x)
            optimizer.step()
        run.save(tmp_path / name, optimizer)
        runs[name] = run, optimizer, x, contents(tmp_path / name)
    for name, (run, optimizer, x, own) in runs.items():
        for other, (*_, saved) in runs.items():
            run.load(tmp_path / other, optimizer)
            run.save(tmp_path / "again", optimizer)
            for key, value in contents(tmp_path / "again").items():
                assert value.dtype == own[key].dtype, (name, other, key)
                assert torch.equal(value, saved[key].to(value.dtype)), (name, other, key)
            assert run.step(x).isfinite()
            optimizer.step()
            run.check(optimizer)


def test_what_an_optimizer_keeps_of_rows_is_converted_too(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(4, 4, dtype=dtype)
        plan = mw.Plan.parse("mesh dp=2\ndata x over dp")
        run = mw.compile(Half().to(dtype), plan, (x,)).launch()
        optimizer = run.optimizer(torch.optim.Adafactor)
        if dtype == torch.bfloat16:
            run.load(tmp_path, optimizer)
        run.step(x)
        optimizer.step()
        run.save(tmp_path, optimizer)
        kept = [value for state in optimizer.state.values() for value in state.values()]
        assert {value.dtype for value in kept if value.ndim} == {dtype}


def test_values_that_another_type_cannot_hold_are_named_and_nothing_is_taken_over(
    tmp_path: Path, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan, runs = mw.Plan.parse("mesh tp=2\ncolumns up over tp\nrows down over tp"), []
    for dtype in (torch.float32, torch.float16):
        x = torch.ones(2, 4, dtype=dtype)
        runs.append(mw.compile(Half().to(dtype), plan, (x,)).launch(seed=1))
    with torch.no_grad():
        next(iter(runs[0].states[1].parameters.values()))[-1, 0] = 70000
    runs[0].save("checkpoint")
    before = runs[1].state_dict()
    with pytest.raises(mw.RunError) as caught:
        runs[1].load("checkpoint")
    golden("loading_too_large", str(caught.value))
    torch.testing.assert_close(runs[1].state_dict(), before, rtol=0, atol=0)


def test_a_state_dict_is_read_without_a_model(tmp_path: Path) -> None:
    run = launched("both", seed=3)
    run.save(tmp_path, adamw(run))
    found = mw.read_state_dict(tmp_path)
    assert found.keys() == {*run.state_dict(), "scratch"}
    assert all(torch.equal(found[name], value) for name, value in run.state_dict().items())
    assert found["head.weight"] is found["wte.weight"]
    with pytest.raises(mw.RunError, match="there is no checkpoint"):
        mw.read_state_dict(tmp_path / "elsewhere")
    with pytest.raises(mw.RunError, match="the path is a `int`"):
        mw.read_state_dict(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["save", "load"])
def test_arguments_of_another_kind_are_refused(tmp_path: Path, method: str) -> None:
    run = launched("tensor")
    with pytest.raises(mw.RunError, match="the path is a `NoneType`"):
        getattr(run, method)(None)
    with pytest.raises(mw.RunError, match="the path is empty\n  help: name a folder"):
        getattr(run, method)("")
    with pytest.raises(mw.RunError, match="the optimizer is a `str`"):
        getattr(run, method)(tmp_path, "AdamW")


def test_a_save_that_goes_while_it_is_read_is_followed_by_the_one_that_took_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "try_lock", lambda *_, **__: None)
    run, other = launched("both", seed=1), launched("tensor", seed=2)
    run.save(tmp_path, extra={"number": 1})
    original, calls = loading.read_into, 0

    def read_into(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            other.save(tmp_path, extra={"number": 2}, keep=1)
        original(*given)

    monkeypatch.setattr(loading, "read_into", read_into)
    third = launched("data", seed=3)
    assert third.load(tmp_path) == {"number": 2}
    assert equal(third, other)

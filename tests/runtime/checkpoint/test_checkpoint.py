"""Checkpoints: any plan's into any other's, optimizer included; damaged ones are told, not run."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import meshwright as mw
from tests.runtime.checkpoint.damage import manifest_of, reseal, sealed, shard
from tests.runtime.models import PLANS, batch, make

ADAMW = {"lr": 1e-2, "weight_decay": 0.1}
PATTERN = (
    "mesh a=2, b=2\nshard blocks.*.up.weight [(4 f@b), (2 d@a)]\nvocab wte, head over (a, b)\n"
)


@functools.cache
def compiled(plan: str) -> mw.Program:
    return mw.compile(make(), mw.Plan.parse(PLANS.get(plan, plan)), example=batch())


def launched(plan: str, seed: int = 0) -> mw.Run:
    """A run with the weights of a seed; programs are compiled once."""
    return compiled(plan).launch(state_dict=make(seed).state_dict())


def train(run: mw.Run, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for number in range(first, first + steps):
        run.step(*batch(number))
        optimizer.step()
        optimizer.zero_grad()


def equal(one: mw.Run, other: mw.Run, tolerance: float = 0.0) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    differences = [(ours[name] - theirs[name]).abs().double().max() for name in theirs]
    return ours.keys() == theirs.keys() and max(differences) <= tolerance


def test_ranks_write_each_entry_once_and_no_padding(tmp_path: Path) -> None:
    run = launched("both")
    run.save(tmp_path)
    entries: dict[str, int] = {}
    holders: dict[str, int] = {}
    for file in tmp_path.glob("*/*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                entries[name] = entries.get(name, 0) + opened.get_tensor(name).numel()
                holders[name] = holders.get(name, 0) + 1
    kept = {**run.state_dict(), "scratch": torch.ones(16)}
    del kept["head.weight"]
    assert entries == {name: tensor.numel() for name, tensor in kept.items()}
    assert holders["wte.weight"] == holders["blocks.0.up.weight"] == 2
    assert holders["blocks.0.ln.weight"] == 1


def test_replicated_tensors_are_written_by_ranks_in_turn(tmp_path: Path) -> None:
    launched("both").save(tmp_path)
    tensors = manifest_of(tmp_path)["tensors"]
    assert {
        tensors[f"blocks.{i}.ln.{which}"]["ranks"][0]
        for i in (0, 1)
        for which in ("weight", "bias")
    } > {0}
    owners = {rank for row in tensors.values() for rank in row["ranks"]}
    assert owners == {0, 1, 2, 3}


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(seed: int) -> mw.Run:
        model = make(dropout=0.3)
        return mw.compile(model, mw.Plan.parse(PLANS["tensor"]), batch()).launch(seed=seed)

    one, other = run(3), run(4)
    one.step(*batch())
    one.save(tmp_path)
    other.load(tmp_path)
    assert torch.equal(one.step(*batch()), other.step(*batch()))


def test_a_second_save_takes_the_place_of_the_first_and_leaves_no_file_of_it(
    tmp_path: Path,
) -> None:
    run = launched("tensor")
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    run.save(tmp_path / "folders" / "are made", optimizer)
    train(run, optimizer, 0, 1)
    run.save(tmp_path / "folders" / "are made", optimizer, keep=1)
    folder = tmp_path / "folders" / "are made"
    assert {str(file.relative_to(folder)) for file in folder.rglob("*")} == {
        "step-1", "step-1/manifest.json", "step-1/00000.safetensors", "step-1/00001.safetensors",
    }  # fmt: skip
    other = launched("data")
    other.load(tmp_path / "folders" / "are made")
    assert equal(run, other)


def test_a_save_that_fails_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launched("tensor")
    run.save(tmp_path)
    before = run.state_dict()
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    train(run, optimizer, 0, 1)

    def full(*_: object) -> None:
        raise mw.RunError("the disk is full")

    monkeypatch.setattr("meshwright.runtime.checkpoint.saving.write_shard", full)
    with pytest.raises(mw.RunError, match="the disk is full"):
        run.save(tmp_path)
    run.load(tmp_path)
    assert all(torch.equal(run.state_dict()[name], before[name]) for name in before)


def test_options_that_are_tensors_or_tuples_come_back_as_such(tmp_path: Path) -> None:
    run = launched("tensor")
    rate = torch.tensor(0.01)
    optimizer = run.optimizer(
        torch.optim.AdamW, lr=rate, betas=(0.8, 0.9), capturable=False, foreach=False
    )
    train(run, optimizer, 0, 1)
    run.save(tmp_path, optimizer)
    rate.fill_(7.0)
    optimizer.param_groups[0]["betas"] = (0.1, 0.2)
    run.load(tmp_path, optimizer)
    assert float(rate) == pytest.approx(0.01)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


MANIFESTS = {
    "not-json": sealed({"format": "meshwright checkpoint", "version": 4})[:-3] + "]",
    "nested-too-deeply": "[" * 100_000,
    "another-format": sealed({"format": "something", "version": 4}),
    "a-list": "[1, 2]",
    "an-earlier-version": sealed({"format": "meshwright checkpoint", "version": 1}),
    "a-later-version": sealed({"format": "meshwright checkpoint", "version": 9}),
    "an-entry-missing": sealed({"format": "meshwright checkpoint", "version": 4, "mesh": []}),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_is_not_ours_is_an_error(tmp_path: Path, case: str) -> None:
    (tmp_path / "manifest.json").write_text(MANIFESTS[case])
    with pytest.raises(mw.RunError, match="is not a manifest that can be read"):
        launched("tensor").load(tmp_path)


@pytest.mark.parametrize("key", ["mesh", "save", "random", "aliases", "optimizer", "tensors"])
@pytest.mark.parametrize("value", [None, -1, "text", [[1]], {"a": 1}, [["tp", 0]], 1e300])
def test_a_manifest_with_an_entry_of_another_kind_is_an_error(
    tmp_path: Path, key: str, value: Any
) -> None:
    run = launched("tensor")
    optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
    run.save(tmp_path, optimizer)
    reseal(tmp_path, {key: value})
    with pytest.raises(mw.RunError):
        run.load(tmp_path, optimizer)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-1, 16]}, {"shape": [10**30, 16]}, {"shape": []}, {"dims": []},
        {"dims": [[[[24, "pp"]]], [[[16]]]]}, {"dims": [[[[25, "tp"]]], [[[16]]]]},
        {"dims": [[], [[[16]]]]}, {"dims": 3}, {"ranks": [0]}, {"ranks": [0, 7]}, {"ranks": None},
        {"shape": [22, 16]}, {"dtype": 3},
    ],
)  # fmt: skip
def test_a_damaged_description_of_a_tensor_is_an_error(tmp_path: Path, change: Any) -> None:
    run = launched("tensor")
    run.save(tmp_path)
    tensors = manifest_of(tmp_path)["tensors"]
    tensors["wte.weight"].update(change)
    reseal(tmp_path, {"tensors": tensors})
    with pytest.raises(mw.RunError):
        run.load(tmp_path)


def test_a_missing_or_cut_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    run = launched("tensor")
    run.save(tmp_path)
    file = shard(tmp_path, 1)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(mw.RunError, match=re.escape(str(file))):
        run.load(tmp_path)
    file.unlink()
    with pytest.raises(mw.RunError, match=re.escape(str(file))):
        run.load(tmp_path)
    with pytest.raises(mw.RunError, match="there is no checkpoint"):
        run.load(tmp_path / "elsewhere")


def test_an_optimizer_of_another_kind_or_grouping_is_refused(tmp_path: Path) -> None:
    run = launched("tensor")
    run.save(tmp_path)
    sgd = run.optimizer(torch.optim.SGD, lr=0.1)
    with pytest.raises(mw.RunError, match="saved without its optimizer"):
        run.load(tmp_path, sgd)
    run.save(tmp_path, sgd)
    with pytest.raises(mw.RunError, match="state of `SGD`, not of `Adam`"):
        run.load(tmp_path, run.optimizer(torch.optim.Adam))
    grouped = run.optimizer(torch.optim.SGD, lr=0.1, groups=[{"params": "**.bias"}])
    with pytest.raises(mw.RunError, match="with the groups that it was saved with"):
        run.load(tmp_path, grouped)
    stranger = torch.optim.SGD(make().parameters(), lr=0.1)
    with pytest.raises(mw.RunError, match="does not hold"):
        run.save(tmp_path, stranger)


def test_another_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    launched("tensor").save(tmp_path)
    model = torch.nn.Linear(4, 4)
    other = mw.compile(model, mw.Plan.parse("mesh dp=1"), (torch.ones(2, 4),), loss=torch.sum)
    with pytest.raises(mw.RunError, match=r"does not fit the model: .*`wte\.weight` is unknown"):
        other.launch().load(tmp_path)

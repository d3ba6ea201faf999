"""Run by a test on two processes: saves and loads in which the two do, or meet, different things.

Argument: a folder. Each rank prints `<mishap>: right` or what was wrong.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.runtime.checkpoint.folder import current_path
from meshwright.runtime.errors import MismatchError
from tests.runtime.checkpoint.forks import become, compiled, ended, forked, launched
from tests.runtime.checkpoint.shard_bytes import ShardBytes
from tests.runtime.checkpoint.states import differing, fill, numbers, shards, snapshot
from tests.runtime.models import batch, make
from tests.runtime.processes import free_port

SECONDS = 30.0
"""The limit on the error of a mishap; a loaded machine and the wait for a peer take most of it."""


@dataclass
class Rank:
    """One of the two, its run, and a checkpoint of this run that is whole."""

    rank: int
    run: mw.Run
    optimizer: torch.optim.Optimizer
    whole: Path

    def refused(self, call: Callable[[], Any], *words: str) -> str:
        """The text of the `RunError` that the call raises, in which these words are."""
        before, begin = snapshot(self.run, self.optimizer), time.monotonic()
        try:
            call()
        except mw.RunError as error:
            text = str(error)
        else:
            raise AssertionError("nothing was raised")
        seconds = time.monotonic() - begin
        assert seconds < SECONDS, f"after {seconds:.0f} s: {text}"
        missing = [word for word in words if word not in text]
        assert not missing, f"no {missing} in: {text}"
        changed = differing(before, snapshot(self.run, self.optimizer))
        assert not changed, f"changed {changed}"
        return text

    def save(self, folder: str | Path) -> None:
        self.run.save(folder, self.optimizer, keep=1)

    def load(self, folder: str | Path) -> None:
        self.run.load(folder, self.optimizer)

    def copy(self, name: str) -> Path:
        """A copy of the whole checkpoint, made by rank 0, seen by both."""
        folder = self.whole.with_name(name)
        if self.rank == 0:
            shutil.copytree(self.whole, folder)
        self.meet()
        return folder

    def meet(self) -> None:
        """Wait for the other."""
        self.run.state_dict()


Mishap = Callable[[Rank], None]
MISHAPS: dict[str, Mishap] = {}


def mishap(function: Mishap) -> Mishap:
    """Register a mishap, and check that the run goes on after it."""

    def meets(rank: Rank) -> None:
        function(rank)
        goes_on(rank)

    MISHAPS[function.__name__.replace("_", " ")] = meets
    return function


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A context in which no file of this process grows past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _fails_on(rank: Rank, culprit: int, size: int) -> None:
    folder = rank.copy(f"full disk of rank {culprit}, {size}")
    fill(rank.run, rank.optimizer, 7)
    limits = full_disk(size) if rank.rank == culprit else contextlib.nullcontext()
    with limits:
        rank.refused(lambda: rank.save(folder), "File too large", folder.name)
    rank.load(folder)
    assert numbers(rank.run, rank.optimizer) == {1}, "the save before is lost"
    fill(rank.run, rank.optimizer, 8)
    rank.save(folder)
    fill(rank.run, rank.optimizer, 9)
    rank.load(folder)
    assert numbers(rank.run, rank.optimizer) == {8}, "the save after is lost"
    assert len(shards(folder)) == 2, f"left over: {shards(folder)}"


@mishap
def the_disk_of_rank_1_is_full(rank: Rank) -> None:
    _fails_on(rank, 1, 0)


@mishap
def the_disk_of_rank_0_is_full(rank: Rank) -> None:
    _fails_on(rank, 0, 0)


@mishap
def the_disk_of_rank_1_fills_in_the_middle(rank: Rank) -> None:
    _fails_on(rank, 1, 20_000)


@mishap
def the_disk_of_rank_0_fills_in_the_middle(rank: Rank) -> None:
    _fails_on(rank, 0, 20_000)


def _flipped(rank: Rank, culprit: int) -> None:
    """Flip a bit of a tensor that is split: only the rank with that part reads it."""
    folder, name = rank.copy(f"a bit of rank {culprit}"), "blocks.0.up.weight"
    if rank.rank == 0:
        file = shards(folder)[culprit]
        found = ShardBytes.read(file)
        place = file.stat().st_size - len(found.data) + found.header[name]["data_offsets"][0] + 5
        raw = bytearray(file.read_bytes())
        raw[place] ^= 16
        file.write_bytes(raw)
    rank.meet()
    rank.refused(lambda: rank.load(folder), shards(folder)[culprit].name, name)


@mishap
def only_rank_0_reads_what_is_damaged(rank: Rank) -> None:
    _flipped(rank, 0)


@mishap
def only_rank_1_reads_what_is_damaged(rank: Rank) -> None:
    _flipped(rank, 1)


@mishap
def a_folder_cannot_be_made(rank: Rank) -> None:
    rank.refused(lambda: rank.save("/proc/nowhere"), "/proc/nowhere")


@mishap
def a_folder_is_a_file(rank: Rank) -> None:
    file = current_path(rank.whole) / "manifest.json"
    rank.refused(lambda: rank.save(file), str(file))
    rank.refused(lambda: rank.load(file), str(file))


@mishap
def a_folder_may_not_be_written(rank: Rank) -> None:
    """Also below a file, where the superuser may not write either."""
    folder = rank.copy("read only")
    file = current_path(folder) / "manifest.json"
    rank.refused(lambda: rank.save(file / "deeper"), "manifest.json")
    if os.getuid():
        folder.chmod(0o555)
        rank.refused(lambda: rank.save(folder), folder.name)
        rank.meet()
        folder.chmod(0o755)


@mishap
def ranks_save_into_different_folders(rank: Rank) -> None:
    folder = rank.whole.with_name("different")
    own = folder / str(rank.rank)
    rank.refused(lambda: rank.save(own), str(folder))
    rank.meet()
    assert not list(own.glob("step-*"))
    assert not shards(folder), f"left over: {shards(folder)}"


@mishap
def ranks_save_below_different_working_folders(rank: Rank) -> None:
    """The same relative name: another folder to each, as on hosts that do not share a disk."""
    before, own = Path.cwd(), rank.whole.with_name(f"working {rank.rank}")
    own.mkdir()
    os.chdir(own)
    rank.refused(lambda: rank.save("here"), "here")
    os.chdir(before)
    assert not list((own / "here").glob("step-*"))


@mishap
def ranks_load_from_different_folders(rank: Rank) -> None:
    fill(rank.run, rank.optimizer, 5)
    other = rank.whole.with_name("other save")
    rank.save(other)
    rank.refused(lambda: rank.load(other if rank.rank else rank.whole))


@mishap
def one_rank_does_not_see_the_folder(rank: Rank) -> None:
    seen = [rank.whole, rank.whole.with_name("nowhere")]
    rank.refused(lambda: rank.load(seen[rank.rank]))
    rank.refused(lambda: rank.load(seen[1 - rank.rank]))


@mishap
def one_rank_passes_a_wrong_path(rank: Rank) -> None:
    paths: list[Any] = [rank.whole, 3]
    rank.refused(lambda: rank.save(paths[rank.rank]))
    rank.refused(lambda: rank.load(paths[1 - rank.rank]))


@mishap
def one_rank_passes_no_optimizer(rank: Rank) -> None:
    folder, optimizers = rank.copy("optimizers"), [rank.optimizer, None]
    rank.refused(lambda: rank.run.save(folder, optimizers[rank.rank]))
    rank.refused(lambda: rank.run.load(folder, optimizers[1 - rank.rank]))


@mishap
def ranks_have_optimizers_of_different_classes(rank: Rank) -> None:
    folder = rank.copy("classes")
    own = rank.run.optimizer((torch.optim.AdamW, torch.optim.Adam)[rank.rank], lr=0.1)
    rank.refused(lambda: rank.run.save(folder, own))
    rank.refused(lambda: rank.run.load(folder, own))


@mishap
def one_rank_s_optimizer_has_no_state(rank: Rank) -> None:
    folder = rank.copy("states")
    own = rank.optimizer if rank.rank else rank.run.optimizer(torch.optim.AdamW, lr=1.0)
    rank.refused(lambda: rank.run.save(folder, own))


@mishap
def ranks_have_different_options(rank: Rank) -> None:
    folder = rank.copy("options")
    rank.optimizer.param_groups[0]["lr"] = 0.1 * (1 + rank.rank)
    rank.refused(lambda: rank.save(folder), "lr")


@mishap
def one_rank_passes_an_optimizer_of_another_model(rank: Rank) -> None:
    folder = rank.copy("strangers")
    stranger = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    optimizers = [rank.optimizer, stranger]
    rank.refused(lambda: rank.run.save(folder, optimizers[rank.rank]))
    rank.refused(lambda: rank.run.load(folder, optimizers[1 - rank.rank]))


@mishap
def ranks_call_save_with_different_options(rank: Rank) -> None:
    folder = rank.copy("save options")
    own = {"step": 3, "rows": [rank.rank]}
    for options, said in (
        ({"wait": not rank.rank}, "`wait=False`, and rank 0 with `wait=True`"),
        ({"keep": (3, None)[rank.rank]}, "`keep=None`, and rank 0 with `keep=3`"),
        ({"extra": own}, "`extra['rows']` unlike rank 0"),
        ({"extra": own if rank.rank else None}, "`extra['step']` unlike rank 0"),
    ):
        text = rank.refused(lambda o=options: rank.run.save(folder, **o), said, "on rank 1: this")
        assert text.startswith("on rank 1"), text
    with pytest.raises(MismatchError):
        rank.run.save(folder, keep=1 + rank.rank)
    assert not list(folder.glob("saving-*"))
    rank.run.save(folder, rank.optimizer, extra=None if rank.rank else own)
    assert rank.run.load(folder, rank.optimizer) == {"step": 3, "rows": [0]}


def goes_on(rank: Rank) -> None:
    """The run still trains, saves and loads."""
    rank.run.step(*batch(3))
    rank.optimizer.step()
    rank.optimizer.zero_grad()
    folder = rank.whole.with_name("goes on")
    fill(rank.run, rank.optimizer, 3)
    rank.save(folder)
    rank.load(rank.whole)
    assert numbers(rank.run, rank.optimizer) == {1}
    rank.load(folder)
    assert numbers(rank.run, rank.optimizer) == {3}
    fill(rank.run, rank.optimizer, 1)


def _nothing(rank: Rank) -> None:
    rank.save(rank.whole)


CALLS: dict[str, Callable[[Rank], Any]] = {
    "save": lambda rank: rank.save(rank.whole),
    "load": lambda rank: rank.load(rank.whole),
    "step": lambda rank: rank.run.step(*batch()),
    "copy_to": lambda rank: rank.run.copy_to(make()),
    "close": lambda rank: rank.run.close(),
}


def _differ(rank: Rank, methods: tuple[str, str]) -> None:
    method = methods[rank.rank]
    if method == "close":
        CALLS[method](rank)
    elif method == "step":  # which has begun, and counted itself
        with pytest.raises(mw.RunError):
            CALLS[method](rank)
    else:
        agrees = not {"step", "close"} & {*methods}
        words = [f"`{called}` on rank" for called in methods] if agrees else []
        rank.refused(lambda: CALLS[method](rank), *words)


DIFFERENT_CALLS: dict[str, Mishap] = {
    f"one rank calls {one} and the other {other}": functools.partial(_differ, methods=(one, other))
    for one, other in [
        ("save", "step"),
        ("step", "load"),
        ("save", "load"),
        ("load", "copy_to"),
        ("save", "close"),
    ]
}


def main(program: mw.Program, number: int, port: int, folder: Path) -> None:
    become(number, 2, port)
    for name, meets in {"nothing": _nothing, **MISHAPS, **DIFFERENT_CALLS}.items():
        outcome = "right"
        try:
            run, optimizer = launched(program, 1)
            with run:
                meets(Rank(number, run, optimizer, folder / "whole"))
        except (AssertionError, Exception) as error:
            outcome = f"{type(error).__name__}: {error}".replace("\n", " / ")
        # In one piece, for the other rank prints too.
        sys.stdout.write(f"{name}: {outcome}\n")
        sys.stdout.flush()


def start(folder: Path) -> None:
    program, port = compiled(), free_port()
    children = [
        forked(lambda number=number: main(program, number, port, folder))  # type: ignore[misc]
        for number in range(2)
    ]
    print("statuses", ended(children, 200))


if __name__ == "__main__":
    start(Path(sys.argv[1]))

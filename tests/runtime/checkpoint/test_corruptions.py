"""Damaged checkpoints: each is refused in words that name it, and the run is as it was."""

from __future__ import annotations

import functools
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.runtime.checkpoint.folder import current_path
from meshwright.runtime.checkpoint.verifying import verify
from tests.runtime.checkpoint.corruptions import CORRUPTIONS, Damage, Scene
from tests.runtime.checkpoint.edits import EDITS, edited, rechained
from tests.runtime.checkpoint.states import differing, snapshot
from tests.runtime.checkpoint.tensor_changes import TENSOR_CHANGES
from tests.runtime.models import PLANS, batch, make

SECONDS = 10.0
"""For a refusal, of this process's own; a loaded machine may make ten times that of it."""
GROUPS = [{"params": ["**.bias"], "weight_decay": 0.0}]
Trained = tuple[mw.Run, torch.optim.Optimizer]


@functools.cache
def compiled(plan: str) -> mw.Program:
    return mw.compile(make(), mw.Plan.parse(PLANS[plan]), example=batch())


def trained(plan: str, seed: int, steps: int = 2) -> Trained:
    run = compiled(plan).launch(state_dict=make(seed).state_dict(), seed=seed)
    optimizer = run.optimizer(torch.optim.AdamW, groups=GROUPS, lr=0.01)
    for number in range(steps):
        train(run, optimizer, number)
    return run, optimizer


def train(run: mw.Run, optimizer: torch.optim.Optimizer, number: int) -> None:
    assert run.step(*batch(number)).isfinite()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One to damage, `whole`, and others that were saved otherwise."""
    folder = tmp_path_factory.mktemp("checkpoints")
    places = ["whole", "other weights", "next save", "other plan", "no optimizer"]
    found = {name: folder / name for name in places}
    run, optimizer = trained("both", 1)
    run.save(found["whole"], optimizer)
    run.save(found["no optimizer"])
    train(run, optimizer, 2)
    run.save(found["next save"], optimizer)
    run, optimizer = trained("both", 2)
    run.save(found["other weights"], optimizer)
    run, optimizer = trained("tensor", 1)
    run.save(found["other plan"], optimizer)
    return {name: current_path(path) for name, path in found.items()}


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """With the memory that a checkpoint of this size needs, and an end to computing and waiting."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    # By another process: one that waits for a pipe may hold the interpreter's lock.
    rescues = [
        subprocess.Popen(["sh", "-c", f'sleep {11 * SECONDS}; exec 3<>"$0"', str(file)])
        for file in folder.rglob("*")
        if file.is_fifo()
    ]
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 2 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for rescue in rescues:
            rescue.kill()
            rescue.wait()


def _stop(*_: object) -> None:
    raise TimeoutError(f"computes for {2 * SECONDS} s")


def judged(scene: Scene, damage: Damage, read: Callable[[], object]) -> str:
    """What comes of reading a damaged checkpoint: `refused`, in time and in words that name it."""
    begin, wall = time.process_time(), time.monotonic()
    try:
        with bounded(scene.folder):
            read()
    except mw.RunError as error:
        message = str(error)
    except Exception as error:
        return f"foreign {type(error).__name__}"
    else:
        return "accepted"
    if max(time.process_time() - begin, (time.monotonic() - wall) / 10) > SECONDS:
        return "slow"
    if len(message) > 2000:
        return "endless"
    return "refused" if damage.is_named_in(message) else f"unnamed: {message}"


def verified(folder: Path) -> None:
    """Raise the first problem that `verify` finds."""
    _, problems = verify(folder)
    if problems:
        raise mw.RunError(problems[0])


@dataclass
class Victim:
    """A run that loads damaged checkpoints, and what came of it."""

    run: mw.Run
    optimizer: torch.optim.Optimizer
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def load(self, scene: Scene, damage: Damage) -> str:
        """Load, and say in a word or two what happened: `refused` is what should."""
        before = snapshot(self.run, self.optimizer)
        found = judged(scene, damage, lambda: self.run.load(scene.folder, self.optimizer))
        if found == "accepted":
            return "loaded"
        if changed := differing(before, snapshot(self.run, self.optimizer)):
            return f"changed {changed[0]} and {len(changed) - 1} more ({found})"
        return found

    def loads_what_was_saved(self, whole: Path) -> bool:
        """Whether what has been loaded is what the undamaged checkpoint holds."""
        now = snapshot(self.run, self.optimizer)
        self.run.load(whole, self.optimizer)
        return not differing(now, snapshot(self.run, self.optimizer))

    def note(self, kind: str, outcome: str, text: str) -> None:
        self.outcomes[outcome.partition(" ")[0].partition(":")[0]] += 1
        if outcome != "refused":
            self.failures.append(f"{kind} ({text}): {outcome}")


KINDS: dict[str, Callable[[Scene], Damage]] = {
    **CORRUPTIONS,
    **{kind: functools.partial(edited, change=change) for kind, change in EDITS.items()},
    **{
        f"{kind}, with digests": functools.partial(rechained, change=change)
        for kind, change in TENSOR_CHANGES.items()
    },
}
"""Those that know of the digests may leave what is loaded as it was; then they are drawn again.

`verify` must refuse whatever a run refuses, except for edits of a manifest, of which only a run can
say that they do not fit it.
"""


def attack(
    victim: Victim, kind: str, seed: int, checkpoints: dict[str, Path], folder: Path
) -> None:
    """Damage a copy until it does damage; load it, train, and note the outcome."""
    whole = checkpoints["whole"]
    for draw in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        scene = Scene(folder, checkpoints, random.Random(f"{kind} {seed} {draw}"))
        damage = KINDS[kind](scene)
        if contents(folder) == contents(whole):
            continue
        disturb(victim.optimizer)
        outcome = victim.load(scene, damage)
        if kind not in CORRUPTIONS and outcome == "loaded" and victim.loads_what_was_saved(whole):
            continue
        victim.note(kind, outcome, f"seed {seed}, draw {draw}")
        alone = judged(scene, damage, lambda: verified(folder))
        if alone != "refused" and not (kind in EDITS and alone == "accepted"):
            victim.failures.append(f"{kind} (seed {seed}, draw {draw}), verify: {alone}")
        if outcome != "refused":
            victim.run, victim.optimizer = trained("both", seed=3, steps=1)
        train(victim.run, victim.optimizer, seed)
        return
    raise AssertionError(f"{kind}: 100 draws changed nothing")


def disturb(optimizer: torch.optim.Optimizer) -> None:
    """Give every option a value that the checkpoint does not have: one left as it was is seen."""
    for group in optimizer.param_groups:
        group.update(lr=0.5, betas=(0.5, 0.6), eps=0.5, weight_decay=0.5, maximize=True)


def contents(folder: Path) -> dict[str, Any]:
    return {
        str(file.relative_to(folder)): file.read_bytes() if file.stat().st_size < 2**30 else None
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(
    "count", [pytest.param(len(KINDS), id="few"), pytest.param(500, marks=pytest.mark.slow)]
)
def test_damaged_checkpoints_are_refused_and_the_run_goes_on(
    tmp_path: Path, checkpoints: dict[str, Path], count: int
) -> None:
    victims = [Victim(*trained(plan, seed=3, steps=1)) for plan in ("both", "tensor", "data")]
    for seed in range(count):
        victim = victims[(seed // len(KINDS)) % len(victims)]
        attack(victim, list(KINDS)[seed % len(KINDS)], seed, checkpoints, tmp_path / "damaged")
    failures = [failure for victim in victims for failure in victim.failures]
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures)
    assert sum(victim.outcomes["refused"] for victim in victims) == count

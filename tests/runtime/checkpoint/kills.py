"""Run by a test: savers that are killed at any moment, and what their folder then holds.

Arguments: a folder, and the number of kills. Prints what went wrong, and how many were right.
A saver fills all of its state with the number of the save, so that a mixture of two is seen.
"""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import meshwright as mw
from tests.runtime.checkpoint.forks import Job, become, compiled, ended, forked, launched
from tests.runtime.checkpoint.states import fill, numbers
from tests.runtime.processes import free_port

STEPS = {"posix", "_io", "fcntl", "mmap", "safetensors", "safetensors._safetensors_rust"}
"""Modules whose functions work on files."""
CHANGES_NOTHING = {"fspath", "fileno", "stat", "fstat", "is_dir", "readinto", "seek", "fsync"}
"""Those after which a folder is as it was."""
Killer = Callable[[list[int], random.Random], None]


def saver(job: Callable[[], Job], folder: Path, first: int, done: int, dies_after: int = 0) -> None:
    """Save again and again, and write each number once its save is done.

    With `dies_after`, dies after as many calls that may change files, its first save not counted.
    """
    run, optimizer = job()
    profile = killer(dies_after) if dies_after else None
    for number in itertools.count(first):
        fill(run, optimizer, number)
        sys.setprofile(profile if number > first else None)
        run.save(folder, optimizer, keep=1)
        sys.setprofile(None)
        os.write(done, struct.pack("<q", number))


def killer(dies_after: int) -> Callable[[FrameType, str, Any], None]:
    """A profile that kills this process after as many calls that may change files."""
    calls = itertools.count(1)

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_return" or called.__name__ in CHANGES_NOTHING:
            return
        owner = getattr(called, "__self__", None)
        modules = {getattr(called, "__module__", None), type(owner).__module__}
        if modules & STEPS and next(calls) >= dies_after:
            os.kill(os.getpid(), signal.SIGKILL)

    return profile


def last_done(pipe: int) -> int:
    """The last number that was written there: the save that was complete when all had ended."""
    os.set_blocking(pipe, False)
    raw = bytearray()
    while select.select([pipe], [], [], 0)[0] and (more := os.read(pipe, 65536)):
        raw += more
    os.close(pipe)
    return max((number for (number,) in struct.iter_unpack("<q", raw)), default=-1)


def killed(program: mw.Program, folder: Path, first: int, seed: int, num_ranks: int) -> list[int]:
    """Start a saver of one process or of several, kill it, and give what may be loaded now."""
    dice = random.Random(seed)
    reading, writing = os.pipe()
    port = free_port()
    dies_after = dice.randrange(1, 150) if seed % 2 else 0
    victims = [seed // 4 % num_ranks] if seed % 4 == 1 else range(num_ranks)

    def job(rank: int) -> None:
        if num_ranks > 1:
            become(rank, num_ranks, port)
        os.close(reading)
        dies = dies_after if rank in victims else 0
        saver(lambda: launched(program, first), folder, first, writing, dies)

    children = [forked(lambda rank=rank: job(rank)) for rank in range(num_ranks)]  # type: ignore[misc]
    os.close(writing)
    select.select([reading], [], [], 60)
    if not dies_after:
        time.sleep(dice.random() * 0.05)
        for victim in victims:
            os.kill(children[victim], signal.SIGKILL)
    statuses = ended(children, 40)
    late = [child for place, child in enumerate(statuses) if child == -9 and place not in victims]
    assert not late, f"a peer of the killed rank still ran: {statuses}"
    complete = last_done(reading)
    assert complete >= first, f"no save of this saver was done: {statuses}"
    return [complete, complete + 1]


def contents(folder: Path) -> Counter[tuple[str, int]]:
    """How many entries of each kind a folder has, at each depth."""
    return Counter((file.suffix, len(file.relative_to(folder).parts)) for file in folder.rglob("*"))


def check(reader: Job, folder: Path, expected: list[int], clean: Counter[tuple[str, int]]) -> None:
    """The folder loads one complete save; the next save works, and nothing else is left."""
    run, optimizer = reader
    run.load(folder, optimizer)
    found = numbers(run, optimizer)
    assert len(found) == 1, f"a mixture: {found}"
    assert found <= set(expected), f"loaded {found}, not one of {expected}"
    fill(run, optimizer, expected[-1] + 1)
    run.save(folder, optimizer, keep=1)
    fill(run, optimizer, -1)
    run.load(folder, optimizer)
    assert numbers(run, optimizer) == {expected[-1] + 1}, "the next save was not kept"
    left = contents(folder)
    assert left == clean, f"left over: {left - clean}, missing: {clean - left}"


def main(folder: Path, num_kills: int, num_ranks: int) -> None:
    program = compiled()
    reader = launched(program, 0)
    reader[0].save(folder / "clean", reader[1], keep=1)
    reader[0].save(folder / "clean", reader[1], keep=1)
    clean, right = contents(folder / "clean"), 0
    target = folder / "target"
    reader[0].save(target, reader[1], keep=1)
    for seed in range(num_kills):
        try:
            expected = killed(program, target, 1000 * (seed + 1), seed, num_ranks)
            check(reader, target, expected, clean)
            right += 1
        except (AssertionError, mw.RunError) as error:
            print(f"kill {seed}: {type(error).__name__}: {error}")
    print(f"{right} of {num_kills} right")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Run by a test: jobs that save into one folder again and again, and others that load from it.

Arguments: a folder, the numbers of savers, of savers of two processes and of readers, and seconds.
Every save is of one number, so that a mixture of two is seen. Prints what went wrong.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import meshwright as mw
from tests.runtime.checkpoint.forks import Job, become, compiled, ended, forked, launched
from tests.runtime.checkpoint.kills import contents
from tests.runtime.checkpoint.states import fill, numbers
from tests.runtime.processes import free_port


def save_again_and_again(job: Job, folder: Path, first: int, seconds: float, rounds: int) -> None:
    """Rounds, if they are given, are the same on every rank of a job, as its steps would be."""
    run, optimizer = job
    begin, number = time.monotonic(), first
    while number < first + rounds if rounds else time.monotonic() - begin < seconds:
        fill(run, optimizer, number)
        run.save(folder, optimizer, keep=1)
        number += 1
    sys.stdout.write(f"saved {number - first}\n")


def load_again_and_again(job: Job, folder: Path, seconds: float) -> None:
    run, optimizer = job
    begin, loaded = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        run.load(folder, optimizer)
        found = numbers(run, optimizer)
        assert len(found) == 1, f"a mixture of {found}"
        loaded += 1
    sys.stdout.write(f"loaded {loaded}\n")


def start(
    program: mw.Program, folder: Path, counts: tuple[int, int, int], seconds: float
) -> list[int]:
    """All jobs at once; they begin when all of them are there."""
    savers, pairs, readers = counts
    jobs: list[Callable[[], None]] = []
    for place in range(savers):
        first = 1000 * (place + 1)
        jobs.append(
            lambda first=first: save_again_and_again(  # type: ignore[misc]
                launched(program, first), folder, first, seconds, 0
            )
        )
    for place in range(2 * pairs):
        if place % 2 == 0:
            port = free_port()
        jobs.append(lambda place=place, port=port: paired(program, folder, place, port))  # type: ignore[misc]
    jobs += [lambda: load_again_and_again(launched(program, 0), folder, seconds)] * readers
    return [forked(job) for job in jobs]


def paired(program: mw.Program, folder: Path, place: int, port: int) -> None:
    """A rank of a job of two processes, which saves and loads in turn."""
    become(place % 2, 2, port)
    first = 100_000 * (place // 2 + 1)
    run, optimizer = launched(program, first)
    for number in range(first, first + 8):
        save_again_and_again((run, optimizer), folder, number, 0.0, 1)
        run.load(folder, optimizer)
        found = numbers(run, optimizer)
        assert len(found) == 1, f"a mixture of {found}"
    run.close()


def main(folder: Path, counts: tuple[int, int, int], seconds: float) -> None:
    program = compiled()
    run, optimizer = launched(program, 1)
    for _ in range(2):
        run.save(folder / "clean", optimizer, keep=1)
    run.save(folder / "target", optimizer, keep=1)
    children = start(program, folder / "target", counts, seconds)
    statuses = ended(children, 60 + 4 * seconds)
    print("statuses", dict(Counter(statuses)))
    run.load(folder / "target", optimizer)
    assert len(numbers(run, optimizer)) == 1, "a mixture at the end"
    # A save that somebody reads as it is replaced stays for the next saver to remove.
    run.save(folder / "target", optimizer, keep=1)
    left = contents(folder / "target") - contents(folder / "clean")
    assert not left, f"left over: {left}"
    assert not any(statuses), "jobs failed"
    print("all right")


if __name__ == "__main__":
    savers, pairs, readers = (int(count) for count in sys.argv[2:5])
    main(Path(sys.argv[1]), (savers, pairs, readers), float(sys.argv[5]))

"""Ranks whose launcher is gone end with it: they do not train on, wait, or hold a port."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.runtime.forked import Forked, Ranks, runs, wait_until

ENDING = ("not_launched", "rendezvous", "step", "gloo", "computes", "operator", "stubborn")
AGENT = ("TORCHELASTIC_RUN_ID", "none")


@contextmanager
def ranks(folder: Path, jobs: list[Ranks]) -> Iterator[tuple[Forked, list[list[int]]]]:
    """A server, and the processes that it has forked for each job, where the job has them be."""
    server = Forked(folder, ["tests.runtime.orphans"])
    processes: list[list[int]] = []
    try:
        for job in jobs:
            cell = server.start(job)
            wanted = [cell / str(rank) for rank in range(job.num_ranks)]
            wait_until(lambda wanted=wanted: all(path.exists() for path in wanted))
            processes.append([int(path.read_text()) for path in wanted])
        yield server, processes
    finally:
        server.kill()
        for process in [each for found in processes for each in found]:
            if runs(process):
                os.kill(process, signal.SIGKILL)


def test_ranks_end_with_their_launcher_whatever_they_do(tmp_path: Path) -> None:
    jobs = [Ranks("tests.runtime.orphans", 2, (mode,)) for mode in ENDING]
    with ranks(tmp_path, jobs) as (server, processes):
        assert all(runs(process) for found in processes for process in found)
        server.kill()
        wait_until(lambda: not any(runs(process) for found in processes for process in found))
        for number in range(1, len(jobs) + 1):
            for rank in range(2):
                output = server.output(number, rank).read_text()
                assert f"meshwright: rank {rank} ends: process" in output, (
                    jobs[number - 1],
                    output,
                )
                assert "which started this rank, has ended\n  help: " in output
    assert not any("meshwright" in name for name in os.listdir("/dev/shm"))


def test_a_handler_of_the_script_is_called_first_and_ranks_that_are_detached_stay(
    tmp_path: Path,
) -> None:
    modes = ("handles", "detached", "session")
    jobs = [Ranks("tests.runtime.orphans", 1, (mode,)) for mode in modes]
    # Under an agent, nothing is detached: torchrun gives every rank a session.
    jobs.append(Ranks("tests.runtime.orphans", 1, ("session",), environment=(AGENT,)))
    with ranks(tmp_path, jobs) as (server, processes):
        (handles,), (detached,), (session,), (under_agent,) = processes
        server.kill()
        wait_until(lambda: not runs(handles) and not runs(under_agent))
        assert "handled\n" in server.output(1, 0).read_text()
        assert runs(detached) and runs(session)


def test_a_process_of_a_loader_that_is_told_to_stop_does_not_end_its_rank(forked: Forked) -> None:
    ((_, ended),) = forked.run(Ranks("tests.runtime.orphans", 1, ("loader",)))
    assert ended.outputs == ["goes on\n"]
    assert ended.codes == [0]

"""Ranks forked from a warmed-up server: see `fork_server.py`, the process at the other end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runtime.processes import ROOT, environment, free_port

SERVER = Path(__file__).with_name("fork_server.py")


@dataclass(frozen=True)
class Ranks:
    """`main` of a module in `num_ranks` processes; those `gone` need not end by themselves."""

    module: str
    num_ranks: int
    args: tuple[str, ...] = ()
    gone: tuple[int, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    seconds: float = 60.0


@dataclass(frozen=True)
class Ended:
    """How each rank ended: its exit code (none if it still ran), its output, after how long."""

    codes: list[int | None]
    outputs: list[str]
    seconds: list[float | None]


class Forked:
    """A server with `modules` imported, and others from their first job on; `run` lets it fork."""

    def __init__(self, folder: Path, modules: Sequence[str]) -> None:
        self.folder, self._number = folder, 0
        path = os.pathsep.join([str(ROOT), environment()["PYTHONPATH"]])
        # A rank that ends first resets connections, of which torch would warn in the others.
        quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER), *modules],
            env=environment() | {"PYTHONPATH": path} | quiet,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate(timeout=60)

    def kill(self) -> None:
        """End it as `kill -9` does: its ranks are orphans."""
        self._server.kill()
        self._server.communicate()

    def start(self, job: Ranks) -> Path:
        """Fork the ranks of a job; the folder that they have to themselves."""
        assert self._server.stdin is not None
        self._number += 1
        request = self._request(job)
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Path(request["environments"][0]["CELL"])

    def run(self, *jobs: Ranks, at_once: int = 4) -> Iterator[tuple[Ranks, Ended]]:
        """How the ranks of each job ended, as they do; `at_once` jobs run beside one another."""
        assert self._server.stdout is not None
        left, running = list(reversed(jobs)), dict[int, Ranks]()
        while left or running:
            while left and len(running) < at_once:
                job = left.pop()
                self.start(job)
                running[self._number] = job
            reply = json.loads(self._server.stdout.readline())
            number = reply["number"]
            job = running.pop(number)
            outputs = [self.output(number, r).read_text() for r in range(job.num_ranks)]
            yield job, Ended(reply["codes"], outputs, reply["seconds"])

    def outputs(self, module: str, num_ranks: int, *args: object, **variables: str) -> list[str]:
        """What each rank of a job prints, which has these environment variables; all end well."""
        words = tuple(map(str, args))
        environment = tuple(variables.items())
        job = Ranks(module, num_ranks, words, environment=environment, seconds=240.0)
        ((_, ended),) = self.run(job)
        assert ended.codes == [0] * num_ranks, ended
        return ended.outputs

    def _request(self, job: Ranks) -> dict[str, Any]:
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(job.num_ranks),
            "CELL": str(self.folder / f"cell{self._number}"),
            **dict(job.environment),
        }
        ranks = range(job.num_ranks)
        return {
            "number": self._number,
            "module": job.module,
            "args": job.args,
            "environments": [common | {"RANK": str(rank)} for rank in ranks],
            "outputs": [str(self.output(self._number, rank)) for rank in ranks],
            "awaited": [rank for rank in ranks if rank not in job.gone],
            "seconds": job.seconds,
        }

    def output(self, number: int, rank: int) -> Path:
        """What this rank of the job with this number prints."""
        return self.folder / f"{number}-{rank}.txt"


def runs(process: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    """Until it holds; fails after `seconds`, which are many for the sake of busy machines."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.05)

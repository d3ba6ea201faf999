"""Forks ranks from a process that has imported torch and the package, and compiled the programs.

A rank that is started by `subprocess` spends seconds on imports; a forked one runs at once. Each
calls `main` of a module, which the server has imported and warmed up before its first ranks, and
ends as `python -m module args` would. Requests and replies are lines of JSON on standard input and
output; `forked.py` is the other end. The server computes nothing that starts threads, which would
not be there in its children.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tqdm import tqdm


@dataclass
class Job:
    """The ranks of one request; `awaited` are those that should end by themselves."""

    number: int
    processes: list[int]
    awaited: list[int]
    deadline: float
    begin: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def reap(self) -> bool:
        """Note which ranks have ended, and return whether the job is over."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes and (found := os.waitpid(process, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(found[1])
                self.seconds[rank] = time.monotonic() - self.begin
        ended = all(rank in self.codes for rank in self.awaited)
        return ended or time.monotonic() > self.deadline

    def reply(self) -> str:
        """The exit code of each rank; None for those that still run, which are killed."""
        for rank, process in enumerate(self.processes):
            if rank not in self.codes:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        ranks = range(len(self.processes))
        return json.dumps(
            {
                "number": self.number,
                "codes": [self.codes.get(rank) for rank in ranks],
                "seconds": [self.seconds.get(rank) for rank in ranks],
            }
        )


def fork(request: dict[str, Any], rank: int) -> int:
    """Fork a process that will call `main`, and return its id; 0 in that process."""
    process = os.fork()
    if process:
        return process
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(request["environments"][rank])
    sys.argv = [request["module"], *request["args"]]
    output = os.open(request["outputs"][rank], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, number)
    return 0


def serve() -> dict[str, Any] | None:
    """Answer requests until there are no more; in a forked rank, the request that it is for."""
    jobs: list[Job] = []
    rest, open_ended = b"", True
    while open_ended or jobs:
        if select.select([0] if open_ended else [], [], [], 0.01)[0]:
            data = os.read(0, 1 << 20)
            open_ended = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                warm_up(request["module"])
                processes = []
                for rank in range(len(request["environments"])):
                    processes.append(fork(request, rank))
                    if not processes[-1]:
                        return request
                deadline = time.monotonic() + request["seconds"]
                jobs.append(Job(request["number"], processes, request["awaited"], deadline))
        for job in [job for job in jobs if job.reap()]:
            jobs.remove(job)
            os.write(1, job.reply().encode() + b"\n")
    return None


@functools.cache
def warm_up(name: str) -> None:
    """Import a module, and let it make what its ranks share."""
    getattr(importlib.import_module(name), "warm_up", bool)()
    threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
    assert threads == 1, f"{threads} threads: forked ranks would miss all but one"
    # The garbage collector would write to every page that the ranks share with this process.
    gc.freeze()


def end(main: Callable[..., object], args: Sequence[str]) -> NoReturn:
    """Call `main` and end as the interpreter does, without taking every module apart."""
    code: object = 0
    try:
        main(*args)
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException as error:
        sys.last_value = error
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    # Its thread would not be in the ranks; torch.export asks for a progress bar.
    tqdm.monitor_interval = 0
    for module in sys.argv[1:]:
        warm_up(module)
    request = serve()
    if request is not None:
        end(importlib.import_module(request["module"]).main, request["args"])

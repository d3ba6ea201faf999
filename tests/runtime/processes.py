"""Start real processes for a test: one rank each, with torchrun's environment variables."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """This process's, with the package importable and one thread per process."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port that nobody listens on, drawn from those that connections are not given.

    Of the ports that the system hands out by itself, another process may be given the same before
    a rank listens on it, whatever suite that process is of.
    """
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def start(script: Path, num_ranks: int, *args: str) -> list[subprocess.Popen[str]]:
    """The processes, by rank; their standard error goes to standard output."""
    common = environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(script), *args],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What each process printed; those that still run after `seconds` are killed and say so."""
    deadline = time.monotonic() + seconds
    outputs = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + f"\nstill ran after {seconds} s"
        outputs.append(output)
    return outputs

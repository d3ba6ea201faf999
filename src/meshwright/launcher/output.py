"""The output of ranks: rank 0's as it is, the others' in whole lines with their rank before each.

With a folder for logs, each rank's standard output and error are one file there, in the order in
which they were written, and only rank 0's are on the terminal too. Those two go through pipes of
their own: what rank 0 writes to both at once is logged in the order in which it is read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from meshwright.launcher.job import Job
from meshwright.models import CommandError

OUT, ERR = 1, 2
_LONGEST = 64 * 1024
"""Bytes of a line; one that is longer is printed in parts."""


def write(stream: int, data: bytes) -> None:
    """Write to this process's output or error; the run goes on if nobody reads it."""
    (sys.stdout if stream == OUT else sys.stderr).flush()
    try:
        while data:
            data = data[os.write(stream, data) :]
    except OSError:
        return


def prefixed(rank: int, text: str) -> str:
    """Lines as they are printed for a rank: those of rank 0 are unmarked."""
    if not rank:
        return text
    lines = text.removesuffix("\n").split("\n") if text else []
    return "".join(f"[rank {rank}] {line}\n" for line in lines)


class _Lines:
    """Prints one stream of a rank in whole lines with the rank before each."""

    def __init__(self, rank: int, stream: int) -> None:
        self.prefix, self.stream = f"[rank {rank}] ".encode(), stream
        self.rest = b""

    def __call__(self, data: bytes) -> None:
        """Take what was read; empty at the end of the stream."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.rest and (not data or len(self.rest) > _LONGEST):
            lines.append(self.rest)
            self.rest = b""
        # A progress bar is one line that is overwritten: only its last state is shown.
        shown = (line.rstrip(b"\r").rpartition(b"\r")[2] for line in lines)
        write(self.stream, b"".join(self.prefix + line + b"\n" for line in shown))


class Output:
    """One rank's standard streams; `file` is its log."""

    def __init__(self, rank: int, file: Path | None) -> None:
        self.rank, self.file = rank, file
        self._log = None if file is None else os.open(file, _FLAGS, 0o666)

    @property
    def is_piped(self) -> bool:
        """Whether what the rank writes comes through this process."""
        return (self.rank == 0) == (self._log is not None)

    @property
    def streams(self) -> tuple[int | None, int | None, int | None]:
        """Input, output and error for the rank's process; rank 0 keeps the terminal."""
        out = subprocess.PIPE if self.is_piped else self._log
        return None if self.rank == 0 else subprocess.DEVNULL, out, out

    def reader(self, stream: int) -> Callable[[bytes], None]:
        """A function that takes the bytes which the rank wrote to a piped stream."""
        if self.rank:
            return _Lines(self.rank, stream)

        def both(data: bytes) -> None:
            write(stream, data)
            self._to_log(data)

        return both

    def error(self, traceback: str, shown: str) -> None:
        """Write an error of the rank: whole to its log, and as `shown` to the terminal."""
        self._to_log(traceback.encode(errors="replace"))
        write(ERR, prefixed(self.rank, shown).encode(errors="replace"))

    def _to_log(self, data: bytes) -> None:
        if self._log is not None:
            while data:
                data = data[os.write(self._log, data) :]

    def close(self) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None


_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def outputs(job: Job) -> dict[int, Output]:
    """The output of every rank of this machine; raises `CommandError` if logs cannot be written."""
    if job.logs is None:
        return {rank: Output(rank, None) for rank in job.ranks}
    files = {rank: job.logs / f"rank-{rank}.log" for rank in job.ranks}
    try:
        job.logs.mkdir(parents=True, exist_ok=True)
        _keep([file for file in files.values() if file.exists()])
        return {rank: Output(rank, file) for rank, file in files.items()}
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CommandError(
            f"cannot write logs to the folder `{job.logs}`: {reason}",
            help="choose a folder that you can write to, such as `--logs logs`",
        ) from None


def _keep(files: list[Path]) -> None:
    """Give the logs of earlier runs other names: `rank-0.log.1`, then `.2`, and so on."""
    number = 1
    while any(file.with_name(f"{file.name}.{number}").exists() for file in files):
        number += 1
    for file in files:
        file.rename(file.with_name(f"{file.name}.{number}"))

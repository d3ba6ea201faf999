"""One launch: ranks are started, watched, and told to end when one of them has failed.

Every rank is a session of its own, so that what it starts in turn (a loader's workers) ends with
it, and a key pressed in the terminal reaches this process alone, which tells the ranks. A rank that
fails is known by its report before its process has ended; the others have a few seconds to notice
by themselves, then they are told to end (SIGTERM), and after the job's grace they are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from meshwright.launcher import verdict
from meshwright.launcher.job import Job
from meshwright.launcher.output import ERR, OUT, Output, outputs, write
from meshwright.launcher.signals import PASSED_ON, Signals
from meshwright.launcher.store import meeting_place
from meshwright.models import CommandError

_RANK = Path(__file__).with_name("rank.py")
_WARDEN = Path(__file__).with_name("warden.py")
_TICK = 0.05
_SECONDS_TO_NOTICE = 5.0
"""How long ranks have to find out by themselves that another one has failed."""
_SECOND_PRESS = 0.25
"""Seconds in which a second signal is the same stop: `timeout` and terminals may send it twice."""


def launch(job: Job) -> int:
    """Run the job to its end; returns its exit code. The last lines printed say what failed.

    Raises `CommandError` where ranks cannot be started.
    """
    with contextlib.ExitStack() as streams_open, meeting_place(job) as place:
        streams = outputs(job)
        for each in streams.values():
            streams_open.callback(each.close)
        with Signals() as signals, _Launch(job, streams, signals) as running:
            running.start(place.host, place.port)
            running.watch()
            text, code = running.verdict()
        place.failed = code != 0
        if text:
            write(ERR, f"\n{text}\n".encode(errors="replace"))
    return code


class _Rank:
    """The process of one rank, its pipes and what is known of its end."""

    def __init__(self, number: int, process: subprocess.Popen[bytes], output: Output) -> None:
        self.number, self.process, self.output = number, process, output
        self.report: verdict.Report | None = None
        self.ended_at = 0.0
        self.told_at: float | None = None
        self.killed = False

    @property
    def runs(self) -> bool:
        return not self.ended_at

    @property
    def failed_at(self) -> float | None:
        """When it failed, if that is known to have happened."""
        if self.report is not None:
            return self.report.time
        return self.ended_at if self.ended_at and self.process.returncode else None

    def tell(self, number: signal.Signals, now: float) -> None:
        """Signal the process, which is left to signal what it has started."""
        if number not in PASSED_ON and self.told_at is None:
            self.told_at = now
        with contextlib.suppress(OSError):
            self.process.send_signal(number)

    def tell_group(self, number: signal.Signals) -> None:
        """Signal the rank and all that it has started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, number)

    def end(self) -> verdict.End:
        failed_at = self.failed_at or self.ended_at
        told = self.told_at is not None and failed_at >= self.told_at
        return verdict.End(
            self.number,
            self.process.returncode,
            failed_at,
            told,
            self.output.file,
            self.report,
        )


class _Launch:
    """The ranks of this machine, from their start to the last one's end."""

    def __init__(self, job: Job, streams: dict[int, Output], signals: Signals) -> None:
        self.job, self.streams, self.signals = job, streams, signals
        self.ranks: list[_Rank] = []
        self.pipes = selectors.DefaultSelector()
        self.stopped: signal.Signals | None = None
        self.stopped_at = 0.0
        self.told = self.hurried = False
        self.kill_at = float("inf")
        self.seen: set[str] = set()
        with _starting("the warden of the ranks"):
            self.warden = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WARDEN)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave nothing behind, whatever happened."""
        for rank in self.ranks:
            if rank.runs:
                rank.tell_group(signal.SIGKILL)
                rank.process.wait()
        self._tell_warden("done")
        self.warden.communicate()
        self.pipes.close()

    def _tell_warden(self, word: str) -> None:
        assert self.warden.stdin is not None
        with contextlib.suppress(OSError):
            self.warden.stdin.write(f"{word}\n".encode())
            self.warden.stdin.flush()

    def start(self, host: str, port: int) -> None:
        """Start every rank of this machine."""
        for number in self.job.ranks:
            with _starting(f"rank {number}"):
                self._start_rank(number, self.job.environment(number, host, port))

    def _start_rank(self, number: int, environment: dict[str, str]) -> None:
        output = self.streams[number]
        stdin, stdout, stderr = output.streams
        report, report_end = os.pipe()
        how = "piped" if output.is_piped else "direct"
        words = [str(os.getpid()), str(report_end), how, *self.job.script]
        try:
            process = subprocess.Popen(
                [sys.executable, str(_RANK), *words],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=environment,
                pass_fds=(report_end,),
                start_new_session=True,
            )
        finally:
            os.close(report_end)
        self._tell_warden(f"+{process.pid}")
        rank = _Rank(number, process, output)
        self.ranks.append(rank)
        self._listen(report, self._reports(rank))
        for stream, pipe in ((OUT, process.stdout), (ERR, process.stderr)):
            if pipe is not None:
                self._listen(os.dup(pipe.fileno()), output.reader(stream))
                pipe.close()

    def _listen(self, pipe: int, take: Callable[[bytes], None]) -> None:
        os.set_blocking(pipe, False)
        self.pipes.register(pipe, selectors.EVENT_READ, take)

    def _reports(self, rank: _Rank) -> Callable[[bytes], None]:
        received = bytearray()

        def take(data: bytes) -> None:
            received.extend(data)
            if received.endswith(b"\n") and rank.report is None:
                rank.report = verdict.Report(**json.loads(received))
                self._show(rank, rank.report)

        return take

    def _show(self, rank: _Rank, report: verdict.Report) -> None:
        """Print an error that no rank has had before; one that is a consequence takes one line."""
        shown = report.traceback
        expected = self.stopped is not None and report.kind in ("KeyboardInterrupt", "SystemExit")
        if report.printed or shown in self.seen or expected:
            shown = ""
        elif report.consequence:
            shown = f"{report.line}\n" if self.stopped is None else ""
        self.seen.add(report.traceback)
        rank.output.error("" if report.printed else report.traceback, shown)

    def watch(self) -> None:
        """Listen until the last rank has ended."""
        while any(rank.runs for rank in self.ranks):
            self._read(_TICK)
            now = time.monotonic()
            for rank in self.ranks:
                if rank.runs and rank.process.poll() is not None:
                    rank.ended_at = now
                    self._tell_warden(f"-{rank.process.pid}")
                    self._sweep(rank)
            self._heed(now)
            self._press(now)
        self._read(0)
        for key in list(self.pipes.get_map().values()):
            self._end_of(key)

    def _sweep(self, rank: _Rank) -> None:
        """Kill what a rank that failed or was stopped has left running."""
        if rank.process.returncode or rank.told_at is not None:
            rank.tell_group(signal.SIGKILL)

    def _read(self, seconds: float) -> None:
        for key, _ in self.pipes.select(seconds):
            for data in _chunks(key.fd):
                key.data(data)
                if not data:
                    self._end_of(key, told=True)

    def _end_of(self, key: selectors.SelectorKey, told: bool = False) -> None:
        if not told:
            key.data(b"")
        self.pipes.unregister(key.fd)
        os.close(key.fd)

    def _heed(self, now: float) -> None:
        """Act on the signals that this process got."""
        for number in self.signals.take():
            if number in PASSED_ON:
                self._tell(number, now)
            elif number == signal.SIGTSTP:
                self._pause()
            elif self.stopped is None:
                self.stopped, self.stopped_at = number, now
                self._tell(number, now)
                self.kill_at = min(self.kill_at, now + self.job.grace)
            elif number == signal.SIGINT and now > self.stopped_at + _SECOND_PRESS:
                self.hurried, self.kill_at = True, now

    def _pause(self) -> None:
        """Suspend all ranks and this process, until the shell resumes it."""
        for number, self_too in ((signal.SIGSTOP, True), (signal.SIGCONT, False)):
            for rank in self.ranks:
                if rank.runs:
                    rank.tell_group(number)
            if self_too:
                os.kill(os.getpid(), number)

    def _press(self, now: float) -> None:
        """Tell ranks to end some time after one has failed, and kill those that do not."""
        failed = [rank.failed_at for rank in self.ranks if rank.failed_at is not None]
        noticed = min(failed, default=now) + _SECONDS_TO_NOTICE
        if now > noticed and self.stopped is None and not self.told:
            self.told = True
            self._tell(signal.SIGTERM, now)
            self.kill_at = now + self.job.grace
        if now >= self.kill_at:
            for rank in self.ranks:
                if rank.runs:
                    rank.killed = True
                    rank.tell_group(signal.SIGKILL)

    def _tell(self, number: signal.Signals, now: float) -> None:
        for rank in self.ranks:
            if rank.runs:
                rank.tell(number, now)

    def verdict(self) -> tuple[str, int]:
        """The last paragraph, empty if all went well, and the exit code."""
        ends = [rank.end() for rank in self.ranks]
        code = verdict.exit_code(ends, self.stopped)
        own = [end for end in ends if end.failed and not end.is_consequence]
        if self.stopped is not None and not own:
            killed = [rank.number for rank in self.ranks if rank.killed]
            return verdict.stop(self.stopped, killed, self.job.grace, self.hurried), code
        return verdict.failure(ends, self.job.world) if code else "", code


@contextlib.contextmanager
def _starting(what: str) -> Iterator[None]:
    """Turn the system's refusal to start a process into a `CommandError`."""
    try:
        yield
    except OSError as error:
        raise CommandError(
            f"cannot start {what}: {(error.strerror or str(error)).lower()}",
            help="lower `--processes`, or raise the limit of this machine (`ulimit -a`)",
        ) from None


def _chunks(pipe: int) -> Iterator[bytes]:
    """What can be read from a pipe now; an empty chunk means that the pipe has ended."""
    data = b"-"
    while data:
        try:
            data = os.read(pipe, 64 * 1024)
        except BlockingIOError:
            return
        yield data

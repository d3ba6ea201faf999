"""The paragraph at the end of a launch that failed or was stopped, and the exit code."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.dsl.errors import printable
from meshwright.launcher.signals import PASSED_ON, STOPS
from meshwright.runtime.errors import spell_ranks, verb

_NAMED = {int(number) for number in signal.Signals}
_TOGETHER = 1.0
"""Seconds: a rank killed within this time after another's error is its cause."""
_LONGEST = 500

_SIGNALS: dict[int, tuple[str, str]] = {
    signal.SIGKILL: (
        "killed by the system (SIGKILL); out of memory is the usual cause",
        "look for `Out of memory` in the system's log (`dmesg`); lower the batch or the processes",
    ),
    signal.SIGSEGV: (
        "ended by a fault in native code (SIGSEGV)",
        "set `PYTHONFAULTHANDLER=1` and run again: it prints the line of Python",
    ),
    signal.SIGABRT: (
        "aborted by native code (SIGABRT)",
        "read the last lines of its output: the library that aborted says why",
    ),
    signal.SIGBUS: (
        "ended by a bus error (SIGBUS): memory that it maps is gone",
        "check whether `/dev/shm` is full (`df -h /dev/shm`) or a file that it maps was cut",
    ),
}
_PASSED = (
    "ended by {name}, which the script does not handle",
    "handle it in the script (`signal.signal`), or do not send it",
)
_OTHER_SIGNAL = (
    "ended by {name}, which this launcher did not send",
    "look for what ends processes here: a time limit, a batch system, a person",
)


@dataclass(frozen=True, slots=True)
class Report:
    """A rank's report of the error that ended its script; `place` is a file and line, or empty."""

    kind: str
    text: str
    place: str
    ours: bool
    consequence: bool
    traceback: str
    printed: bool
    time: float

    @property
    def line(self) -> str:
        """The error in one line."""
        first = _shortened(self.text.strip().partition("\n")[0])
        return f"{self.kind}: {first}" if first else self.kind


@dataclass(frozen=True, slots=True)
class End:
    """How one rank ended: `code` as `subprocess` has it, `told` whether it was told to end."""

    rank: int
    code: int
    time: float
    told: bool
    log: Path | None
    report: Report | None = None

    @property
    def failed(self) -> bool:
        return self.code != 0 or self.report is not None

    @property
    def is_consequence(self) -> bool:
        return self.told or (self.report is not None and self.report.consequence)

    @property
    def cause(self) -> tuple[Any, ...]:
        """What ranks that failed alike have in common."""
        return (self.report.line, self.report.place) if self.report else (self.code,)


def exit_code(ends: Sequence[End], stopped: signal.Signals | None) -> int:
    """The code of the rank that failed first, or 128 plus the signal that stopped the run."""
    if stopped is not None:
        return 128 + stopped
    failed = [end for end in ends if end.failed]
    if not failed:
        return 0
    first = culprit(failed)
    if first.report is not None:
        # Its process may have been told to end while it was exiting by itself.
        return 128 + signal.SIGINT if first.report.kind == "KeyboardInterrupt" else 1
    return 128 - first.code if first.code < 0 else first.code


def culprit(failed: Sequence[End]) -> End:
    """The rank that failed first by itself, not because another one did."""
    own = [end for end in failed if not end.is_consequence] or list(failed)
    first = min(own, key=lambda end: end.time)
    for end in own:
        # Its peers may have noticed, and failed, before the end of its process was seen.
        if end.code < 0 and end.time < first.time + _TOGETHER:
            return end
    return first


def failure(ends: Sequence[End], world: int) -> str:
    """The paragraph of a launch in which a rank failed."""
    failed = [end for end in ends if end.failed]
    first = culprit(failed)
    own = [end for end in failed if end.is_consequence == first.is_consequence]
    alike = [end.rank for end in own if end.cause == first.cause]
    lines, help = _what(first, _who(alike, world), len(alike) == 1)
    if first.report is not None and first.report.place:
        lines.append(f"  at: {first.report.place}")
    if first.log is not None:
        lines.append(f"  log: {first.log}")
    for end in own:
        if end.rank not in alike and not first.is_consequence:
            said = end.report.line if end.report else _ended(end.code)[0]
            lines.append(f"  later: rank {end.rank}, {said}")
    return "\n".join([*lines, f"  help: {help}"])


def _who(ranks: Sequence[int], world: int) -> str:
    if len(ranks) == world > 1:
        return f"all {world} ranks"
    return spell_ranks(ranks) + (f" of {world}" if len(ranks) == 1 < world else "")


def _what(end: End, who: str, alone: bool) -> tuple[list[str], str]:
    """What happened in a line or more, and what to do."""
    report = end.report
    if report is None:
        said, help = _ended(end.code, alone)
        return [f"{who} {said}"], help
    if report.kind == "SystemExit":
        found = "search the script for this text, which it passed to `sys.exit`"
        return [f"{who} ended: {_shortened(report.text)}"], found
    if not report.ours:
        return [f"{who} failed: {report.line}"], "read the traceback above, and fix the script"
    problem, *rest = printed_lines(report.text)
    helps = [line.strip() for line in rest if line.strip().startswith("help: ")]
    where = [line.rstrip() for line in rest if line.strip() not in helps]
    help = helps[-1].removeprefix("help: ") if helps else "read the traceback above"
    return [f"{who} failed: {report.kind}: {problem}", *where], help


def printed_lines(text: str) -> list[str]:
    """The lines of an error's text, without what a terminal cannot show."""
    return [printable(line) for line in text.strip().splitlines()] or [""]


def _ended(code: int, alone: bool = True) -> tuple[str, str]:
    """How a process ended, by its exit code, and what to do."""
    # A handler that exits in order gives the signal in its exit code.
    number = code - 128 if code - 128 in STOPS else -code
    if number <= 0:
        what = f"ended with exit code {code}"
        return what, "read what it printed last: it ended by itself, without a Python error"
    name = signal.Signals(number).name if number in _NAMED else f"signal {number}"
    said, help = _SIGNALS.get(number, _PASSED if number in PASSED_ON else _OTHER_SIGNAL)
    return f"{'was' if alone else 'were'} {said.format(name=name)}", help


def stop(number: signal.Signals, killed: Sequence[int], grace: float, hurried: bool) -> str:
    """The paragraph of a launch that a signal has stopped; `killed` did not end by themselves."""
    name = "Ctrl-C (SIGINT)" if number == signal.SIGINT else number.name
    if not killed:
        return f"stopped by {name}: every rank has ended"
    if hurried:
        return f"stopped by {name}, twice: {verb(killed, 'was', 'were')} killed"
    slow = f"{verb(killed, 'was', 'were')} killed after {grace:g} s"
    return (
        f"stopped by {name}: {slow}\n"
        f"  help: give ranks longer to end, such as `--grace {max(30, 2 * grace):g}`"
    )


def _shortened(text: str) -> str:
    text = printable(text.strip())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."

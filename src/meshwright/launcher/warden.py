"""Ends every rank of a launch whose launcher was killed without a chance to do so (SIGKILL).

Started by its path, in a session of its own, with the standard library alone. Its standard input is
a pipe from the launcher, which ends when that process does, however it does. It reads the process
groups of ranks that have started (`+123`) and ended (`-123`), and `done` after an orderly end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    """Wait for the launcher's end, then kill what it has left."""
    # A stop may be sent to every process of a job, and the launcher still needs this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        word = line.strip()
        if word == b"done":
            return
        (groups.add if word.startswith(b"+") else groups.discard)(int(word[1:]))
    for group in groups:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()

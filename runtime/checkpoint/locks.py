"""Locks on open files that the kernel frees when a process ends, however it ends.

A file's presence says nothing, so there is nothing stale to clear away. Some network filesystems
have no locks: what depends on one has to be right without it too.
"""

from __future__ import annotations

import contextlib
import fcntl


def try_lock(file: int, *, shared: bool) -> bool | None:
    """Lock an open file without waiting, and whether that worked; None where there are no locks.

    Closing the file unlocks it. Any number may share a lock; one that is not shared is held alone.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def unlock(file: int) -> None:
    """Unlock an open file, also for processes that were forked while it was locked."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)

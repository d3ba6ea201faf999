"""The connected sockets of this process, most of them torch's: find them, end one, see one end."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Connection:
    """A connected socket that torch has opened: its descriptor, and the inode that it had then."""

    number: int
    inode: int

    def abort(self) -> None:
        """Shut it down, so that a thread which waits for it returns."""
        with contextlib.suppress(OSError), self._duplicate() as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)

    def ended(self) -> bool:
        """Whether the other end has closed it."""
        try:
            with self._duplicate() as duplicate:
                return not duplicate.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _duplicate(self) -> socket.socket:
        duplicate = os.dup(self.number)
        if os.fstat(duplicate).st_ino == self.inode:
            return socket.socket(fileno=duplicate)
        os.close(duplicate)
        raise OSError(errno.EBADF, "closed, and its number used again")


def connections() -> Iterator[Connection]:
    """This process's connected sockets."""
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            number = int(name)
            # A socket object takes over its descriptor only if that is one of a socket.
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as duplicate:
                if duplicate.family in (socket.AF_INET, socket.AF_INET6):
                    duplicate.getpeername()
                    yield Connection(number, os.fstat(number).st_ino)

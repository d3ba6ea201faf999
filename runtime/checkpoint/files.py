"""Files and folders as checkpoints need them: safe from crashes, pipes and devices."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from meshwright.runtime.errors import RunError

_PIECE = 4 << 20
COPY_AGAIN = "copy the whole folder of the checkpoint again, or load another one"
"""Help for what is damaged or not there."""
MAKE_ROOM = "make room there, or name another folder"


@contextlib.contextmanager
def regular_file(path: Path) -> Iterator[BinaryIO]:
    """A file opened to read. Raises `OSError`, also for a pipe, a device or a folder."""
    check_name(path)
    # Opening a pipe would wait for its other end.
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(number, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        yield file


def size_of(file: BinaryIO) -> int:
    """The bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_all(file: BinaryIO, target: memoryview) -> Iterator[memoryview]:
    """Fill `target` from where a file stands, in pieces. Raises `OSError` where the file ends."""
    done = 0
    while done < len(target):
        count = file.readinto(target[done : done + _PIECE])  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.EIO, "it ends too early")
        yield target[done : done + count]
        done += count


def pieces(file: BinaryIO, count: int) -> Iterator[memoryview]:
    """The next `count` bytes, in pieces that share their memory. Raises `OSError` without them."""
    room = memoryview(bytearray(min(count, _PIECE)))
    while count:
        yield from read_all(file, room[:count])
        count -= min(count, len(room))


def write_all(file: BinaryIO, data: memoryview) -> Iterator[memoryview]:
    """Write `data` where a file stands, in pieces."""
    done = 0
    while done < len(data):
        count = file.write(data[done : done + _PIECE])
        yield data[done : done + count]
        done += count


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, for as long as the tensor lives."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def read_bytes(file: BinaryIO, count: int) -> bytes:
    """The next `count` bytes. Raises `OSError` where there are fewer."""
    data = bytearray(count)
    for _ in read_all(file, memoryview(data)):
        pass
    return bytes(data)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they outlast a crash."""
    check_name(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Put a folder's list of names on the disk."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as error:
        # Some filesystems keep names safe by themselves, and refuse.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(number)


def cannot(what: str, path: Path, error: OSError, help: str) -> RunError:
    """The error for a file that the system refused to read or to write."""
    reason = error.strerror or str(error)
    return RunError(f"cannot {what} `{path}`: {reason}", help=help)


def check_name(path: Path) -> None:
    """Raise `OSError` for a name that Python does not hand to the system."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name has a null byte")

"""The folder of checkpoints: each is a subfolder `step-120`, whole from the moment it has its name.

A save is written as `saving-...`, 128 random bits, and renamed once it is whole: nothing is ever
written over. Whoever writes or reads a checkpoint shares a lock on the file of its rank 0. What is
removed gets a name of the first kind back before; a folder of such a name that nobody has locked is
what a killed process left, and the next save removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Self, TypeVar, cast

from meshwright.runtime.checkpoint.files import (
    COPY_AGAIN,
    MAKE_ROOM,
    cannot,
    check_name,
    make_folder,
    sync_folder,
    write_all,
)
from meshwright.runtime.checkpoint.locks import try_lock, unlock
from meshwright.runtime.checkpoint.manifest import (
    MANIFEST,
    Head,
    Manifest,
    head_of,
    manifest_text,
    parse_manifest,
    shard_sizes,
)
from meshwright.runtime.checkpoint.shards import Shards, create_file, shard_path
from meshwright.runtime.errors import RunError, check_kind

_CHECKPOINT = re.compile(r"step-\d+(-\d+)?")
_UNFINISHED = re.compile(r"saving-[0-9a-f]{32}")
_SHARD = re.compile(r"\d{5,}\.(safetensors|sha256)")
_NAME_ONE = f"name a folder that `save` wrote into, or one with a `{MANIFEST}`"
_FILE = re.compile(f"{_SHARD.pattern}|{re.escape(MANIFEST)}")
_OURS = re.compile(f"{_CHECKPOINT.pattern}|{_FILE.pattern}")
_ATTEMPTS, _PAUSE = 100, 0.01
T = TypeVar("T")


def folder_of(path: object) -> Path:
    """The folder that `save` and `load` are called with. Raises `RunError` for what names none."""
    check_kind(path, (str, Path), "the path", "pass the name of a folder")
    if path == "":
        raise RunError("the path is empty", help='name a folder; `"."` is the working directory')
    return Path(cast(str | Path, path))


def new_folder_of(path: object) -> Path:
    """The folder that `save` is called with, whatever the working directory is while it is written.

    Raises `RunError` for what names none.
    """
    folder = folder_of(path)
    try:
        return folder.absolute()
    except OSError as error:
        raise cannot("write into", folder, error, "name a folder to write into") from None


def check_keep(keep: object) -> int | None:
    """The number of checkpoints to keep. Raises `RunError` for what is not a count or None."""
    help = "pass how many checkpoints to keep, or `None` for all"
    if keep is None:
        return None
    check_kind(keep, int, "`keep`", help)
    if isinstance(keep, bool) or cast(int, keep) < 1:
        raise RunError(f"`keep` is {keep}", help=help)
    return cast(int, keep)


class NewSave:
    """A save under way, on rank 0. Nothing is touched before `begin`.

    `close`, however the save went, leaves a whole checkpoint or nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, ""
        self.file: BinaryIO | None = None
        """The file of rank 0, whose lock tells others that this save is in use."""

    @property
    def path(self) -> Path:
        """The subfolder that this save is written into."""
        return unfinished_path(self.folder, self.name)

    def begin(self) -> str:
        """Make and lock the subfolder, and return its name. Raises `RunError` where that fails."""
        if os.path.lexists(self.folder / MANIFEST):
            raise RunError(
                f"`{self.folder}` is a checkpoint itself: it has a `{MANIFEST}`",
                help="name the folder that is to hold checkpoints",
            )
        try:
            make_folder(self.folder)
            for _ in range(_ATTEMPTS):
                # Not torch's generator, nor Python's: a save must not change what they draw.
                self.name = secrets.token_hex(16)
                self.path.mkdir()
                if self._lock():
                    return self.name
        except OSError as error:
            raise cannot("write into", self.folder, error, "name a folder to write into") from None
        raise RunError(
            f"cannot write into `{self.folder}`: what is made there is removed at once",
            help="name another folder, or see what cleans this one",
        )

    def _lock(self) -> bool:
        """Lock this save, and whether that worked: another may have removed it as unused before."""
        path = shard_path(self.path, 0)
        try:
            self.file = create_file(path)
        except FileNotFoundError:
            return False
        locked = try_lock(self.file.fileno(), shared=True)
        if locked is not False and _is_at(self.file, path):
            return True
        self.file.close()
        self.file = None
        return False

    def commit(self, manifest: Manifest, keep: int | None) -> Path:
        """Make this save, which is whole, a checkpoint, and return its folder.

        The newest `keep` are kept, this one included. Raises `RunError`.
        """
        file = self.path / MANIFEST
        try:
            number = 1 + max((head.number for head, _ in _heads(self.folder)[0]), default=0)
            text = replace(manifest, number=number).to_text()
            with create_file(file) as opened:
                for _ in write_all(opened, memoryview(text.encode())):
                    pass
                os.fsync(opened.fileno())
            sync_folder(self.path)
            found = self._rename(manifest.random["step"])
            sync_folder(self.folder)
        except OSError as error:
            raise cannot("write", file, error, MAKE_ROOM) from None
        self._release()
        remove_unused(self.folder, keep)
        return found

    def _rename(self, step: int) -> Path:
        """Give the save the name of its step, with a number behind it if there is one already."""
        name, again = f"step-{step}", 1
        while True:
            try:
                # It would take the place of an empty folder, which is not a checkpoint.
                os.rename(self.path, self.folder / name)
                return self.folder / name
            except OSError:
                if not os.path.lexists(self.folder / name):
                    raise
                again += 1
                name = f"step-{step}-{again}"

    def close(self) -> None:
        """End this save, and remove what there is of it if it has not become a checkpoint."""
        if self.name:
            with contextlib.suppress(OSError):
                _remove_files(self.path)
                self.path.rmdir()
            self._release()

    def _release(self) -> None:
        self.name = ""
        if self.file is not None:
            # A process that was forked meanwhile holds the file, too.
            unlock(self.file.fileno())
            self.file.close()
            self.file = None


def unfinished_path(folder: Path, save: str) -> Path:
    """The subfolder that a save is written into, and removed from."""
    return folder / f"saving-{save}"


def checkpoints(folder: Path) -> list[tuple[Head, Path]]:
    """The checkpoints below a folder, the newest last.

    In the order in which they were saved: a run that went back to an earlier step saves newer ones
    than those of the steps ahead. Raises `RunError` for one whose place in that order is not known.
    """
    try:
        found, problem = _heads(folder)
    except OSError as error:
        raise _none_in(folder, error.strerror) from None
    if problem is not None:
        if found:
            problem.help += f"; or load another by its name, such as `{found[-1][1]}`"
        raise problem
    return found


def _heads(folder: Path) -> tuple[list[tuple[Head, Path]], RunError | None]:
    """The checkpoints below a folder, in order, and the problem with one that cannot be read.

    Raises `OSError` for a folder that cannot be listed.
    """
    found, problem = _seen(folder, partial(_heads_listed, folder), lambda seen: any(seen))
    return sorted(found, key=lambda each: (each[0].number, each[1].name)), problem


def _heads_listed(folder: Path) -> tuple[list[tuple[Head, Path]], RunError | None]:
    found, problem = [], None
    for path in _subfolders(folder):
        try:
            found.append((head_of(path), path))
        except RunError as error:
            # It may have been removed since it was listed.
            if os.path.lexists(path):
                problem = error
    return found, problem


def _seen(folder: Path, look: Callable[[], T], is_something: Callable[[T], bool]) -> T:
    """What `look` finds in a folder; nothing only where nobody renamed meanwhile.

    What gets its name after the listing has passed there, and what loses it before its head is
    read, are not seen: with many savers that can be all there is. Raises `OSError`.
    """
    check_name(folder)
    for _ in range(_ATTEMPTS):
        before = _stamp(folder)
        found = look()
        if is_something(found) or _stamp(folder) == before:
            break
        time.sleep(_PAUSE)
    return found


def _stamp(folder: Path) -> tuple[int, frozenset[str]]:
    """Changes with every rename: of the time alone, several could be in one tick of the clock."""
    return os.stat(folder).st_mtime_ns, frozenset(os.listdir(folder))


class OpenSave:
    """A checkpoint, kept from being removed while it is read.

    Without locks in the filesystem it may vanish all the same, once there are newer ones.
    """

    def __init__(self, path: Path, text: str) -> None:
        """Open the one in `path`, with this manifest. Raises `RunError` for what makes no sense."""
        self.path, self.text = path, text
        self.manifest = parse_manifest(path, text)
        self.shards = Shards(path, self.manifest.save, self.manifest.shards)
        self._lock = _shared_lock(shard_path(path, 0))

    @classmethod
    def current(cls, folder: Path) -> Self:
        """The checkpoint in `folder`, or the newest of those below it, with every file in place.

        Raises `RunError` that names what is missing or damaged.
        """
        for _ in range(_ATTEMPTS):
            path = current_path(folder)
            try:
                found = cls(path, manifest_text(path))
            except RunError:
                if not _gone(path, folder):
                    raise
                continue
            try:
                found.shards.check()
            except RunError:
                found.close()
                if not _gone(path, folder):
                    raise
            else:
                # Locked or not, it was there when all of its files had been seen.
                return found
        raise RunError(
            f"the checkpoints in `{folder}` are replaced faster than they can be read",
            help="load when fewer runs save there",
        )

    def gone(self, folder: Path) -> bool:
        """Whether this one, the newest in `folder` a moment ago, was removed for newer ones."""
        return _gone(self.path, folder)

    def close(self) -> None:
        """Unlock it, so that it can be removed."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listed(folder: Path) -> list[Path]:
    """The checkpoint in `folder`, or all below it, whole or damaged and also those not finished.

    The newest are first, and those whose place is not known last. Raises `RunError` without any.
    """
    if os.path.lexists(folder / MANIFEST):
        return [folder]
    try:
        found = [path for _, path in reversed(_heads(folder)[0])]
        found += sorted(set(_subfolders(folder)) - set(found))
        found += sorted(Path(e) for e in os.scandir(folder) if _UNFINISHED.fullmatch(e.name))
    except OSError as error:
        raise _none_in(folder, error.strerror) from None
    if not found:
        raise _none_in(folder)
    return found


def _none_in(folder: Path, reason: str | None = None) -> RunError:
    why = f": {reason}" if reason else ""
    others = [] if reason else renamed(folder)
    return RunError(
        f"there is no checkpoint in `{folder}`{why}",
        where=[f"`{path}` has files of one, under another name" for path in others[:4]],
        help=f"name it, `{others[0]}`, or give it back a name like `step-10`"
        if others
        else _NAME_ONE,
    )


def is_unfinished(path: Path) -> bool:
    """Whether a folder of checkpoints has this one under a name of those that are being written."""
    return _UNFINISHED.fullmatch(path.name) is not None


def current_path(folder: Path) -> Path:
    """The folder of the checkpoint that `folder` names: itself, or the newest below it.

    Raises `RunError` where there is none.
    """
    if os.path.lexists(folder / MANIFEST):
        return folder
    found = checkpoints(folder)
    if not found:
        raise _none_in(folder)
    return found[-1][1]


def has_none(folder: Path) -> bool:
    """Whether there is no checkpoint at all, whole or damaged, in or below a folder."""
    try:
        return not _seen(folder, partial(_has_ours, folder), bool)
    except FileNotFoundError as error:
        if os.path.islink(folder):
            raise cannot("read", folder, error, "mount or make what it links to") from None
        return True
    except OSError as error:
        raise cannot("read", folder, error, COPY_AGAIN) from None


def _has_ours(folder: Path) -> bool:
    return any(_OURS.fullmatch(name) for name in os.listdir(folder))


def renamed(folder: Path) -> list[Path]:
    """The subfolders with files of a checkpoint whose names are not those of one: those that
    somebody renamed. Saves that were not finished are not among them."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if not _CHECKPOINT.fullmatch(entry.name) and not _UNFINISHED.fullmatch(entry.name):
                # What cannot be listed, such as `lost+found`, is somebody else's.
                with contextlib.suppress(OSError):
                    if any(map(_FILE.fullmatch, os.listdir(entry))):
                        found.append(Path(entry))
    return sorted(found)


def _subfolders(folder: Path) -> list[Path]:
    """The folders named as checkpoints are. Raises `OSError`."""
    return [Path(entry) for entry in os.scandir(folder) if _CHECKPOINT.fullmatch(entry.name)]


def _gone(path: Path, folder: Path) -> bool:
    return path != folder and not os.path.lexists(path)


def remove_unused(folder: Path, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints that are whole, and what killed processes left.

    What somebody has locked stays. Without locks in the filesystem, what was left stays too: it may
    be a save under way. Nothing else is touched: neither other names, nor links, nor a folder with
    files that no save writes.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _UNFINISHED.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_unfinished(Path(entry))
        kept = 0
        for head, path in reversed(_heads(folder)[0]):
            if keep is None or kept < keep:
                kept += _is_whole(path)
            else:
                with contextlib.suppress(OSError, RunError):
                    _retire(folder, path, head)


def _is_whole(path: Path) -> bool:
    """Whether all files of a checkpoint are there, each in its size."""
    try:
        sizes = shard_sizes(manifest_text(path))
        return all(os.stat(shard_path(path, r)).st_size == size for r, size in enumerate(sizes))
    except (RunError, OSError):
        return False


def _retire(folder: Path, path: Path, head: Head) -> None:
    """Remove a checkpoint that nobody reads; whenever that ends, it is there whole, or not."""
    if path.is_symlink():
        return
    file = os.open(shard_path(path, 0), os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        # Another process may have removed it, and a third have saved under its name.
        if try_lock(file, shared=False) is False or head_of(path) != head:
            return
        unfinished = unfinished_path(folder, head.save)
        os.rename(path, unfinished)
        _remove_files(unfinished)
    finally:
        os.close(file)
    unfinished.rmdir()


def _remove_unfinished(path: Path) -> None:
    first = shard_path(path, 0)
    try:
        file = os.open(first, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        # Begun a moment ago, and then its owner sees that it has gone; or half removed.
        _remove_files(path, unless=first)
        path.rmdir()
        return
    try:
        if try_lock(file, shared=False):
            _remove_files(path)
    finally:
        os.close(file)
    path.rmdir()


def _remove_files(path: Path, unless: Path | None = None) -> None:
    """Remove the files of a save, that of rank 0, which is locked, last.

    Nothing is removed where there are other files, or where there is `unless`.
    """
    entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)
    # What a network filesystem keeps of a file that is open somewhere goes by itself.
    entries = [entry for entry in entries if not entry.name.startswith(".nfs")]
    names = [entry.name for entry in entries]
    ours = all(map(_FILE.fullmatch, names))
    if ours and not (unless is not None and unless.name in names):
        for entry in entries:
            os.unlink(entry)


def _shared_lock(path: Path) -> int | None:
    """A descriptor whose lock keeps a save; None where there are no locks, or nothing to lock."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    for _ in range(_ATTEMPTS):
        # Another has it alone only while it finds out whether the save can be removed.
        if try_lock(file, shared=True) is not False:
            break
        time.sleep(_PAUSE)
    return file


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False

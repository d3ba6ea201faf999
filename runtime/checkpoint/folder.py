"""The folder of a checkpoint: saves side by side, and a manifest that names the current one.

Each save is a subfolder whose name is drawn at random, so that nothing is ever written over. The
manifest is moved into place once the save is whole. Whoever writes or reads a save shares a lock on
the file of its rank 0; a save that the manifest does not name and nobody has locked is unused, and
the next save into the folder removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from pathlib import Path
from typing import BinaryIO, Self, cast

from meshwright.runtime.checkpoint.files import (
    MAKE_ROOM,
    cannot,
    make_folder,
    sync_folder,
    write_all,
)
from meshwright.runtime.checkpoint.locks import try_lock
from meshwright.runtime.checkpoint.manifest import (
    MANIFEST,
    SAVE,
    Manifest,
    check_replaceable,
    manifest_text,
    named_save,
    parse_manifest,
)
from meshwright.runtime.checkpoint.shards import Shards, create_file, shard_path
from meshwright.runtime.errors import RunError, check_kind

_SHARD = re.compile(r"\d{5,}\.safetensors")
_ATTEMPTS, _PAUSE = 100, 0.01


def folder_of(path: object) -> Path:
    """The folder that `save` and `load` are called with. Raises `RunError` for what names none."""
    check_kind(path, (str, Path), "the path", "pass the name of a folder")
    if path == "":
        raise RunError("the path is empty", help='name a folder; `"."` is the working directory')
    return Path(cast(str | Path, path))


class NewSave:
    """A save under way, on rank 0. Nothing is touched before `begin`.

    `close`, however the save went, leaves the folder with one whole save or with the one before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, ""
        self.file: BinaryIO | None = None
        """The file of rank 0, whose lock tells others that this save is in use."""
        self._moved = False

    @property
    def path(self) -> Path:
        """The subfolder of this save."""
        return self.folder / self.name

    def begin(self) -> str:
        """Make and lock the subfolder, and return its name. Raises `RunError` where that fails."""
        try:
            make_folder(self.folder)
            check_replaceable(self.folder)
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
        path = shard_path(self.folder, self.name, 0)
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

    def commit(self, manifest: Manifest) -> None:
        """Make this save, which is whole, the one that the folder's manifest names."""
        before, file = named_save(self.folder), self.path / MANIFEST
        try:
            with create_file(file) as opened:
                for _ in write_all(opened, memoryview(manifest.to_text().encode())):
                    pass
                os.fsync(opened.fileno())
            sync_folder(self.path)
            sync_folder(self.folder)
            self._moved = True
            os.replace(file, self.folder / MANIFEST)
            sync_folder(self.folder)
        except OSError as error:
            raise cannot("write", self.folder / MANIFEST, error, MAKE_ROOM) from None
        self._release()
        remove_unused(self.folder, before)

    def close(self) -> None:
        """End this save, and remove what there is of it if it has not become the current one."""
        if not self.name:
            return
        named = named_save(self.folder)
        # Where the manifest cannot be read any more, it may be this one's.
        if named != self.name and not (named is None and self._moved):
            with contextlib.suppress(OSError):
                _remove_files(self.path)
                self.path.rmdir()
        self._release()

    def _release(self) -> None:
        self.name = ""
        if self.file is not None:
            self.file.close()
            self.file = None


class OpenSave:
    """The current save of a folder, kept from being removed while it is read.

    Without locks in the filesystem it may vanish all the same, once another is whole.
    """

    def __init__(self, folder: Path, text: str) -> None:
        """Open the save that this manifest names. Raises `RunError` for one that makes no sense."""
        self.folder, self.text = folder, text
        self.manifest = parse_manifest(folder, text)
        self.shards = Shards(folder, self.manifest.save, self.manifest.shards)
        self._lock = _shared_lock(shard_path(folder, self.manifest.save, 0))

    @classmethod
    def current(cls, folder: Path) -> Self:
        """The save that the manifest of `folder` names now, with every file of it in place.

        Raises `RunError` that names what is missing or damaged.
        """
        for _ in range(_ATTEMPTS):
            found = cls(folder, manifest_text(folder))
            try:
                found.shards.check()
            except RunError:
                replaced = found.replaced()
                found.close()
                if not replaced:
                    raise
            else:
                # Locked or not, it was there when all of its files had been seen.
                return found
        raise RunError(
            f"the checkpoint in `{folder}` is replaced faster than it can be read",
            help="load when fewer runs save there",
        )

    def replaced(self) -> bool:
        """Whether the folder has another save by now, so that this one may have gone."""
        return named_save(self.folder) not in (None, self.manifest.save)

    def close(self) -> None:
        """Unlock it, so that it can be removed once it is not the current one."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_unused(folder: Path, before: str | None) -> None:
    """Remove the saves that the manifest does not name and nobody has locked.

    Without locks in the filesystem, only the one `before` is removed: others may be under way.
    Nothing else is touched: neither other names, nor a folder with files that no save writes.
    """
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if SAVE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_unused(folder, entry.name, entry.name == before)


def _remove_unused(folder: Path, name: str, complete: bool) -> None:
    path, first = folder / name, shard_path(folder, name, 0)
    try:
        file = os.open(first, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        # Begun a moment ago, and then its owner sees that it has gone; or half removed.
        _remove_files(path, unless=first)
        path.rmdir()
        return
    try:
        free = try_lock(file, shared=False)
        if free is False or (free is None and not complete):
            return
        # It may have become the current one before it was locked here.
        if named_save(folder) in (None, name):
            return
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
    ours = all(name == MANIFEST or _SHARD.fullmatch(name) for name in names)
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

"""What a folder of checkpoints has: each with its step, its size and whether it is whole."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from meshwright.runtime.checkpoint.folder import folder_of, is_unfinished, listed
from meshwright.runtime.checkpoint.manifest import MANIFEST, Manifest, manifest_text, parse_manifest
from meshwright.runtime.checkpoint.shards import Shards
from meshwright.runtime.errors import RunError


@dataclass(frozen=True, slots=True)
class Listed:
    """A checkpoint on the disk. `manifest` is None where that cannot be read."""

    path: Path
    saved: datetime
    """When its manifest was written, or its folder where there is none."""
    num_bytes: int
    """Of all files in its folder."""
    manifest: Manifest | None
    problem: str
    """Why it cannot be loaded; empty where every file is there, in its size and with its header."""


def checkpoints_in(path: str | Path) -> list[Listed]:
    """The checkpoint in the folder `path`, or all below it, the newest first.

    Also those that are damaged, and saves that were not finished. Raises `RunError` without any.
    """
    found = [_listed(each) for each in listed(folder_of(path))]
    return [each for each in found if each is not None]


def _listed(path: Path) -> Listed | None:
    """One checkpoint; None if it was removed since it was found."""
    manifest, problem = None, ""
    try:
        files = [entry.stat().st_size for entry in os.scandir(path)]
        dated = path / MANIFEST if os.path.exists(path / MANIFEST) else path
        saved = datetime.fromtimestamp(dated.stat().st_mtime, UTC)
    except OSError as error:
        if not os.path.lexists(path):
            return None
        files, saved = [], datetime.fromtimestamp(0, UTC)
        problem = f"cannot read `{path}`: {error.strerror}"
    if is_unfinished(path):
        problem = problem or "not finished: it is being written, or its process was killed"
    else:
        try:
            manifest = parse_manifest(path, manifest_text(path))
            Shards(path, manifest.save, manifest.shards).check()
        except RunError as error:
            problem = problem or error.problem
    return Listed(path, saved, sum(files), manifest, problem)

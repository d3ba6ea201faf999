"""Checkpoints changed on purpose: with the digests made right again, so that what is behind them
is tried, or without."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshwright.runtime.checkpoint.folder import current_path
from meshwright.runtime.checkpoint.shards import shard_path


def manifest_of(folder: Path) -> Any:
    """What the manifest of the newest checkpoint says."""
    return json.loads((current_path(folder) / "manifest.json").read_text())


def sealed(content: Mapping[str, Any]) -> str:
    """The text of a manifest with this content, and the digest of that."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in rest.items()]
    return with_digest("".join(["{\n", *lines]))


def with_digest(text: str) -> str:
    """The text of a manifest but for its last line, and that line."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text}  "sha256": "{digest}"\n}}\n'


def reseal(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of a manifest, as one who wants to be believed."""
    file = current_path(folder) / "manifest.json"
    file.write_text(sealed({**manifest_of(folder), **changes}))


def shard(folder: Path, rank: int) -> Path:
    """The file of a rank in the newest checkpoint."""
    return shard_path(current_path(folder), rank)

"""Give every layer its own copy of what layers share in a checkpoint, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.dsl.errors import PlanError
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Share
from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.checkpoint.fitting import check_names
from meshwright.runtime.checkpoint.folder import NewSave, OpenSave
from meshwright.runtime.checkpoint.manifest import Manifest
from meshwright.runtime.checkpoint.optimizer_loading import check_whole
from meshwright.runtime.checkpoint.optimizer_state import tensor_name
from meshwright.runtime.checkpoint.resharding import written
from meshwright.runtime.errors import RunError


def delink(source: Path, target: Path, *, reset: bool = False) -> Path:
    """Write the checkpoint in `source` below the folder `target`, with a copy of what is shared for
    every layer, and return its folder.

    It is cut as it was, and has the optimizer's state of the shared parameters for each copy or,
    with `reset`, none. One tensor is held at a time. Raises `RunError` for a checkpoint that is
    damaged, or in which no layers share parameters; then nothing is written.
    """
    with apart_from_caller("cpu"), OpenSave.current(source) as opened:
        manifest = opened.manifest
        check_names(manifest, opened.path)
        if manifest.apart is None:
            raise RunError(
                f"no layers share parameters in the checkpoint `{opened.path}`",
                help="load it as it is",
            )
        # By the name of a tensor in the model, in its order: the one that is saved.
        copied = {name: manifest.aliases[name] for name in manifest.apart.values()}
        sources = dict(copied)
        kept = {} if reset else check_whole(manifest)
        for name, own in copied.items():
            labels = {tensor_name(key, name): tensor_name(key, own) for key in kept.get(own, ())}
            sources |= {copy: each for copy, each in labels.items() if each in manifest.tensors}
        tensors = {name: manifest.tensors[each] for name, each in sources.items()}
        new = NewSave(target)
        try:
            save = new.begin()
            changed = replace(
                manifest,
                save=save,
                plan=_plan(manifest.plan),
                aliases=manifest.apart,
                apart=None,
                tensors=tensors,
                optimizer=_optimizer(manifest, copied, reset=reset),
                shards=written(opened, new, manifest.mesh, tensors, sources),
            )
            return new.commit(changed, None)
        finally:
            new.close()


def _optimizer(
    manifest: Manifest, copied: Mapping[str, str], *, reset: bool
) -> dict[str, Any] | None:
    """The entry of an optimizer that has each copy in the group of what was shared."""
    entry = manifest.optimizer
    if entry is None:
        return None
    groups = [
        {**group, "names": [copy for copy, name in copied.items() if name in own]}
        for group in entry["groups"]
        for own in (set(group["names"]),)
    ]
    kept = {
        part: {copy: entry[part][name] for copy, name in copied.items() if name in entry[part]}
        for part in ("kept", "numbers")
    }
    return {**entry, "groups": groups, **({part: {} for part in kept} if reset else kept)}


def _plan(text: str) -> str:
    """The text of a plan without its `share` statements, or all of one that cannot be read."""
    try:
        found = Plan.parse(text).without(Share)
    except PlanError:
        return text
    return found.source.text

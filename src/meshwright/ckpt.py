"""What `meshwright ckpt ...` does. Each command takes its arguments and returns an exit code."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meshwright.commands import compiled, print_json, print_text
from meshwright.compiler.graph.text import size_text
from meshwright.compiler.report.sheet import Column, Sheet
from meshwright.compiler.report.tables import sheet_text
from meshwright.dsl.errors import plural
from meshwright.runtime.checkpoint.delinking import delink as delink_to
from meshwright.runtime.checkpoint.exporting import export as export_to
from meshwright.runtime.checkpoint.folder import is_unfinished, listed
from meshwright.runtime.checkpoint.header import dtype_of
from meshwright.runtime.checkpoint.listing import Listed, checkpoints_in
from meshwright.runtime.checkpoint.manifest import Manifest, SavedTensor
from meshwright.runtime.checkpoint.resharding import reshard as reshard_to
from meshwright.runtime.checkpoint.verifying import verify as problems_of

_WIDTH = 100


def ls(arguments: Namespace) -> int:
    """List the checkpoints of a folder, or the tensors of one."""
    found = checkpoints_in(arguments.folder)
    if arguments.json:
        print_json([_listed(each, tensors=arguments.tensors) for each in found])
        return 0
    print_text(sheet_text(_checkpoints(found), _WIDTH))
    for each in found:
        if each.problem:
            print_text(f"\n{each.path} cannot be loaded: {each.problem}")
        elif arguments.tensors and each.manifest is not None:
            print_text(f"\n{each.path}\n{sheet_text(_tensors(each.manifest), _WIDTH)}")
    return 0


def _checkpoints(found: list[Listed]) -> Sheet:
    scaled = any(each.manifest and each.manifest.loss_scale for each in found)
    columns = (
        *(Column("checkpoint"), Column("step", right=True), Column("saved", fixed=True)),
        *(Column("size", right=True), Column("files", right=True), Column("mesh")),
        *(Column("tensors", right=True), Column("optimizer")),
        *([Column("loss scale", right=True)] if scaled else []),
        Column("state", fixed=True),
    )
    rows = []
    for each in found:
        saved = each.saved.astimezone().strftime("%Y-%m-%d %H:%M")
        row = [str(each.path), "", saved, size_text(each.num_bytes), *[""] * (4 + scaled)]
        if (manifest := each.manifest) is not None:
            row[1] = str(manifest.random["step"])
            row[4:] = [str(len(manifest.shards)), str(manifest.mesh)]
            row += [str(len(manifest.tensors)), _optimizer(manifest) or "-"]
            if scaled:
                row.append(f"{manifest.loss_scale.value:g}" if manifest.loss_scale else "-")
        rows.append((*row, "incomplete" if each.problem else "complete"))
    return Sheet("", columns, tuple(rows))


def _tensors(manifest: Manifest) -> Sheet:
    columns = (Column("tensor"), Column("type"), Column("size", right=True), Column("layout"))
    rows = [
        (name, saved.dtype, size_text(_num_bytes(saved)), str(saved.layout))
        for name, saved in manifest.tensors.items()
    ]
    return Sheet("", columns, tuple(rows))


def _num_bytes(saved: SavedTensor) -> int:
    return math.prod(saved.shape) * dtype_of(saved.dtype).itemsize


def _optimizer(manifest: Manifest) -> str | None:
    return None if manifest.optimizer is None else str(manifest.optimizer.get("class"))


def _listed(each: Listed, *, tensors: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "checkpoint": str(each.path),
        "complete": not each.problem,
        "problem": each.problem,
        "saved": each.saved.isoformat(timespec="seconds"),
        "bytes": each.num_bytes,
    }
    if (manifest := each.manifest) is not None:
        found |= {
            "step": manifest.random["step"],
            "seed": manifest.random["seed"],
            "mesh": dict(manifest.mesh.axes),
            "plan": manifest.plan,
            "files": len(manifest.shards),
            "optimizer": _optimizer(manifest),
            "loss_scale": manifest.loss_scale and asdict(manifest.loss_scale),
            "tensors": len(manifest.tensors),
        }
        if tensors:
            found["tensors"] = {
                name: {
                    "shape": saved.shape,
                    "dtype": saved.dtype,
                    "bytes": _num_bytes(saved),
                    "layout": str(saved.layout),
                }
                for name, saved in manifest.tensors.items()
            }
    return found


def verify(arguments: Namespace) -> int:
    """Read every byte of each checkpoint in a folder, and say what is wrong."""
    found = listed(Path(arguments.folder))
    whole = [path for path in found if not is_unfinished(path)]
    data = []
    for path in whole:
        manifest, problems = problems_of(path)
        data.append({"checkpoint": str(path), "complete": not problems, "problems": problems})
        if arguments.json:
            continue
        if not problems and manifest is not None:
            files, tensors = plural(len(manifest.shards), "file"), len(manifest.tensors)
            size = size_text(sum(shard.size for shard in manifest.shards))
            print_text(f"{path}: complete; {plural(tensors, 'tensor')} in {files}, {size}")
        for problem in problems:
            print_text(f"{path}: {problem}")
    if arguments.json:
        print_json(data)
    elif unfinished := len(found) - len(whole):
        print_text(f"not read: {plural(unfinished, 'save')} not finished")
    return 0 if whole and all(each["complete"] for each in data) else 1


def reshard(arguments: Namespace) -> int:
    """Write a checkpoint anew, cut for another plan or into so many files."""
    wanted = arguments.parts or compiled(arguments)
    made = reshard_to(Path(arguments.src), Path(arguments.dst), wanted)
    if arguments.json:
        print_json(_listed(checkpoints_in(made)[0], tensors=False))
    else:
        print_text(sheet_text(_checkpoints(checkpoints_in(made)), _WIDTH))
    return 0


def delink(arguments: Namespace) -> int:
    """Write a checkpoint with a copy of what layers share for each of them."""
    made = delink_to(Path(arguments.src), Path(arguments.dst), reset=arguments.reset)
    if arguments.json:
        print_json(_listed(checkpoints_in(made)[0], tensors=False))
    else:
        print_text(sheet_text(_checkpoints(checkpoints_in(made)), _WIDTH))
    return 0


def export(arguments: Namespace) -> int:
    """Write the weights of a checkpoint as one safetensors file."""
    file = Path(arguments.file)
    count = export_to(Path(arguments.src), file)
    num_bytes = file.stat().st_size
    if arguments.json:
        print_json({"file": str(file), "bytes": num_bytes, "tensors": count})
    else:
        print_text(f"{file}: {plural(count, 'tensor')}, {size_text(num_bytes)}")
    return 0

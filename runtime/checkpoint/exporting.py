"""Write the weights of a checkpoint as one safetensors file, for tools of others."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import torch

from meshwright.runtime.ambient import apart_from_caller
from meshwright.runtime.checkpoint.files import cannot, sync_folder, write_all
from meshwright.runtime.checkpoint.fitting import check_names, model_tensors
from meshwright.runtime.checkpoint.folder import OpenSave
from meshwright.runtime.checkpoint.header import dtype_of, header_bytes, placed
from meshwright.runtime.checkpoint.parts import read_whole
from meshwright.runtime.checkpoint.shards import create_file, write_tensor
from meshwright.runtime.errors import RunError


def export(folder: Path, file: Path) -> int:
    """Write what the model's `state_dict()` has into the new `file`, and return how many tensors.

    Names are the model's own. Of tied ones, the first is written, and the others are in the file's
    metadata, where `safetensors.torch.load_model` and Hugging Face look for them. No more than two
    copies of one tensor are held. Raises `RunError`; then there is no file.
    """
    if file.suffix != ".safetensors":
        whole = file / "model.safetensors" if file.is_dir() else f"{file}.safetensors"
        raise RunError(f"`{file}` does not end in `.safetensors`", help=f"write `{whole}`")
    if os.path.lexists(file):
        raise RunError(f"`{file}` is there already", help="name another file, or remove that one")
    unfinished = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    try:
        with apart_from_caller("cpu"), OpenSave.current(folder) as opened:
            count = _write(opened, unfinished)
        os.rename(unfinished, file)
        sync_folder(file.parent)
    except OSError as error:
        raise cannot("write", file, error, "name a file in a folder with room for it") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
    return count


def _write(opened: OpenSave, file: Path) -> int:
    manifest = opened.manifest
    check_names(manifest, opened.path)
    kept = [name for name in model_tensors(manifest) if name not in manifest.transient]
    # Those of larger elements first: each then begins where its type may.
    kept.sort(key=lambda name: -dtype_of(manifest.tensors[name].dtype).itemsize)
    empty = {
        name: torch.empty(saved.shape, dtype=dtype_of(saved.dtype), device="meta")
        for name in kept
        for saved in (manifest.tensors[name],)
    }
    tied = {
        alias: name for alias, name in manifest.aliases.items() if alias != name and name in empty
    }
    with create_file(file) as out:
        header = header_bytes({"format": "pt", **tied}, placed(empty))
        for _ in write_all(out, memoryview(header)):
            pass
        for name in kept:
            write_tensor(out, read_whole(name, manifest, opened.shards))
        os.fsync(out.fileno())
    return len(kept)

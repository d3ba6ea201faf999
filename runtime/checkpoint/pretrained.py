"""Weights in safetensors files, as Hugging Face keeps them: one file, or several with an index."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from meshwright.runtime.checkpoint.files import cannot, read_bytes, regular_file, size_of
from meshwright.runtime.checkpoint.header import Held, header_length, parse_tensors, unique
from meshwright.runtime.errors import RunError
from meshwright.runtime.state.weights import MappedTensors

_FILE, _INDEX = ".safetensors", ".safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LARGEST_INDEX = 256 << 20
_DOWNLOAD = "download or copy the folder again"


def weights_in(path: Path) -> Path | None:
    """The safetensors file or index that `path` is, or that the folder `path` has; None without.

    Raises `RunError` where there are several without an index, and where all weights are pickled.
    """
    if not path.is_dir():
        if path.name.endswith(_PICKLED) and path.is_file():
            _refuse_pickled(path)
        return path if path.name.endswith((_FILE, _INDEX)) else None
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise cannot("read", path, error, "name a folder to read") from None
    single = [name for name in names if name.endswith(_FILE)]
    indices = [name for name in names if name.endswith(_INDEX)]
    for name in (f"model{_FILE}", f"model{_INDEX}"):
        if name in names:
            return path / name
    # Of the files that an index names, some may be missing.
    if len(found := indices or single) == 1:
        return path / found[0]
    if found:
        raise RunError(
            f"`{path}` has {len(found)} {'indices' if indices else 'files'} of weights, and no "
            f"`model{_INDEX}`",
            help=f"name one of them: `{path / found[0]}`",
        )
    if pickled := [name for name in names if name.endswith(_PICKLED)]:
        _refuse_pickled(path / pickled[0])
    return None


def read_weights(path: Path) -> MappedTensors:
    """The tensors of a safetensors file, or of the files that an index names.

    Raises `RunError` that names the file, and the tensor if it is about one.
    """
    if not path.name.endswith(_INDEX):
        return MappedTensors(_mapped(path))
    places = _places(path)
    files = {file: _mapped(path.parent / file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in files[file]:
            raise RunError(
                f"`{path.parent / file}` has no `{name}`, which `{path}` says it has",
                help=_DOWNLOAD,
            )
    return MappedTensors((name, files[file][name]) for name, file in places.items())


def _places(index: Path) -> dict[str, str]:
    """The file of each tensor, by what an index says."""
    try:
        with regular_file(index) as opened:
            if (size := size_of(opened)) > _LARGEST_INDEX:
                raise ValueError(f"it has {size} bytes")
            found = json.loads(read_bytes(opened, size), object_pairs_hook=unique)
        places = found["weight_map"]
        if not isinstance(places, dict) or not places:
            raise TypeError("`weight_map` is not a dictionary with the file of each tensor")
        for name, file in places.items():
            if not isinstance(file, str) or not file.endswith(_FILE) or "/" in file:
                raise ValueError(f"the file of `{name}` is {str(file)[:80]!r}")
    except OSError as error:
        raise cannot("read", index, error, _DOWNLOAD) from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise RunError(f"`{index}` is not an index of weights: {reason}", help=_DOWNLOAD) from None
    return places


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory that is read from it where it is used."""
    try:
        with regular_file(path) as file:
            size = size_of(file)
            text = read_bytes(file, header_length(read_bytes(file, min(8, size)), size))
        metadata, held = parse_tensors(text)
        start, end = 8 + len(text), max((each.end for each in held.values()), default=0)
        if size != start + end:
            raise ValueError(f"its tensors do not fill its {size} bytes")
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    except OSError as error:
        raise cannot("read", path, error, _DOWNLOAD) from None
    except (ValueError, RuntimeError) as error:  # the second is torch's for what it cannot map
        raise RunError(f"`{path}` cannot be read: {error}", help=_DOWNLOAD) from None
    if "save" in metadata:
        raise RunError(
            f"`{path}` is the part of one rank of a checkpoint", help="name the checkpoint's folder"
        )
    return {name: _view(data, start, each) for name, each in held.items()}


def _view(data: Tensor, start: int, held: Held) -> Tensor:
    found = data[start + held.start : start + held.end]
    if (start + held.start) % held.dtype.itemsize:
        # Old files are not aligned; torch has no such tensors.
        found = found.clone()
    return found.view(held.dtype).view(held.shape)


def _refuse_pickled(file: Path) -> NoReturn:
    raise RunError(
        f"`{file}` is a pickle, which can execute anything when it is read",
        help="convert it to safetensors, once and from a source that you trust: "
        "`AutoModel.from_pretrained(folder).save_pretrained(new_folder)` of transformers does",
    )

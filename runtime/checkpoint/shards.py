"""Shards on disk, in the safetensors format: a header of JSON, then the bytes of each tensor."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from meshwright.runtime.checkpoint.manifest import shard_name
from meshwright.runtime.errors import RunError

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def dtype_of(name: str) -> torch.dtype:
    """The type that a manifest calls `name`, such as `float32`. Raises `RunError` for others."""
    for dtype in _DTYPES:
        if str(dtype) == f"torch.{name}":
            return dtype
    raise RunError(
        f"a checkpoint says type `{name[:40]}`, which there is not",
        help="load another checkpoint: this one is damaged",
    )


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file. (The library's own writer goes through numpy, which nothing else here needs.)

    Raises `RunError` for a type that the format lacks, or where the file cannot be written.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise RunError(
                f"`{name}` has type `{tensor.dtype}`, which checkpoints cannot hold",
                help="hold it in another type, such as two real tensors for a complex one",
            )
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                _write(file, tensor)
    except OSError as error:
        raise RunError(
            f"cannot write `{path}`: {error.strerror}",
            help="make room there, or name another folder",
        ) from None


def _write(file: BinaryIO, tensor: Tensor) -> None:
    data = tensor.detach().cpu().contiguous()
    if data.nbytes:
        file.write((ctypes.c_char * data.nbytes).from_address(data.data_ptr()))


class Shards:
    """The files of one save, opened when first needed and mapped, not read whole."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        self._open: dict[int, Any] = {}

    def part(self, rank: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the file that `rank` wrote. Raises `RunError` unless it is there in whole."""
        file = self.path / shard_name(self.number, rank)
        try:
            if rank not in self._open:
                self._open[rank] = safe_open(file, framework="pt", device="cpu")
            tensor: Tensor = self._open[rank].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"cannot read `{name}` from `{file}`: {error}",
                help="copy the whole folder of the checkpoint, or load another one",
            ) from None
        if tuple(tensor.shape) != shape:
            raise RunError(
                f"`{name}` in `{file}` is {list(tensor.shape)}, not {list(shape)}",
                help="load another checkpoint: this one is damaged",
            )
        return tensor

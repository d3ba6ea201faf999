"""The header of a safetensors file: JSON that says where each tensor is, of what type and shape.

Ours also has, in the format's `__metadata__`, the save and the rank that wrote the file and a
SHA-256 of each of a tensor's tiles.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meshwright.runtime.checkpoint.tiles import Tiles
from meshwright.runtime.errors import RunError

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_MOST_BYTES = 100_000_000
"""The library's limit on a header."""
_MOST_DIMS = 64
_DIGITS = re.compile(r"[0-9a-f]+")
_DIGEST, _HEX = "sha256/", 64


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in a file: type, shape, first and last byte after the header; in a file of ours, the
    SHA-256 of its tiles in hex, one after the other."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    digest: str = ""

    def digest_of(self, tile: int) -> str:
        """The SHA-256 of one tile."""
        return self.digest[_HEX * tile : _HEX * (tile + 1)]


@dataclass(frozen=True, slots=True)
class Header:
    """What a shard says of itself."""

    save: str
    rank: int
    tensors: Mapping[str, Held]

    @staticmethod
    def of(save: str, rank: int, tensors: Mapping[str, Tensor]) -> Header:
        """The header of these tensors, one after the other; their digests are yet to be found."""
        found = {
            name: replace(held, digest="0" * _HEX * len(Tiles(held.shape, held.dtype.itemsize)))
            for name, held in placed(tensors).items()
        }
        return Header(save, rank, found)

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return max((held.end for held in self.tensors.values()), default=0)

    def to_bytes(self) -> bytes:
        """The length of the JSON and the JSON; digests do not change how long it is."""
        metadata = {"save": self.save, "rank": str(self.rank)}
        metadata |= {_DIGEST + name: held.digest for name, held in self.tensors.items()}
        return header_bytes(metadata, self.tensors)

    @staticmethod
    def parse(text: bytes) -> Header:
        """The header that JSON describes. Raises `ValueError` for what `to_bytes` does not write.

        Nothing in it is trusted.
        """
        metadata, found = parse_tensors(text)
        try:
            held = {name: _digested(each, metadata[_DIGEST + name]) for name, each in found.items()}
            return Header(metadata["save"], int(metadata["rank"]), held)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None


def parse_tensors(text: bytes) -> tuple[Mapping[str, Any], dict[str, Held]]:
    """The metadata and the tensors, without digests, in the header of any safetensors file.

    Raises `ValueError` for what is not one: tensors must follow each other without gaps, each as
    long as its type and shape say.
    """
    try:
        rows = json.loads(text, object_pairs_hook=unique)
        metadata = rows.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("`__metadata__` is not a dictionary")
        held = {name: _named(name, row) for name, row in rows.items()}
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    _check_tiling(held.values())
    return metadata, held


def header_bytes(metadata: Mapping[str, str], tensors: Mapping[str, Held]) -> bytes:
    """The first bytes of a safetensors file: the length of the JSON, and the JSON."""
    rows = {
        name: {
            "dtype": _DTYPES[held.dtype],
            "shape": held.shape,
            "data_offsets": (held.start, held.end),
        }
        for name, held in tensors.items()
    }
    text = json.dumps({"__metadata__": metadata, **rows}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def placed(tensors: Mapping[str, Tensor]) -> dict[str, Held]:
    """Where tensors are that are written one after the other."""
    found: dict[str, Held] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        found[name] = Held(tensor.dtype, tuple(tensor.shape), offset, end)
        offset = end
    return found


def check_types(tensors: Mapping[str, Tensor]) -> None:
    """Raise `RunError` for a tensor of a type that the format lacks."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise RunError(
                f"`{name}` has type `{tensor.dtype}`, which checkpoints cannot hold",
                help="hold it in another type, such as two real tensors for a complex one",
            )


def header_length(first: bytes, file_size: int) -> int:
    """The bytes of JSON that the first eight bytes of a file promise.

    Raises `ValueError` where there is no room for them, or more than any header needs.
    """
    length = int.from_bytes(first, "little")
    if not 2 <= length <= min(_MOST_BYTES, file_size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {file_size}")
    return length


def dtype_of(name: str) -> torch.dtype:
    """The type that a manifest calls `name`, such as `float32`. Raises `ValueError` for others."""
    for dtype in _DTYPES:
        if str(dtype) == f"torch.{name}":
            return dtype
    raise ValueError(f"unknown type `{name[:40]}`")


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for a key that comes twice: one value would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _named(name: str, row: Mapping[str, Any]) -> Held:
    try:
        return _held(row)
    except KeyError as error:
        raise ValueError(f"`{name}`: `{error.args[0]}` is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"`{name}`: {error}") from None


def _held(row: Mapping[str, Any]) -> Held:
    dtype = _BY_NAME.get(row["dtype"])
    if dtype is None:
        raise ValueError(f"unknown type `{str(row['dtype'])[:40]}`")
    shape = tuple(row["shape"])
    start, end = row["data_offsets"]
    if len(row) != 3 or len(shape) > _MOST_DIMS:
        raise ValueError("an entry of another form")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, start, end)):
        raise ValueError("a size that is not a count")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes for {list(shape)} of {dtype}")
    return Held(dtype, shape, start, end)


def _digested(held: Held, digest: str) -> Held:
    length = _HEX * len(Tiles(held.shape, held.dtype.itemsize))
    if not _DIGITS.fullmatch(digest) or len(digest) != length:
        raise ValueError("digests of another form")
    return replace(held, digest=digest)


def _check_tiling(tensors: Iterable[Held]) -> None:
    expected = 0
    for held in sorted(tensors, key=lambda held: (held.start, held.end)):
        if held.start != expected:
            raise ValueError(f"byte {expected} belongs to no tensor, or to two")
        expected = held.end

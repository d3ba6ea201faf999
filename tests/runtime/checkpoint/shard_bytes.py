"""A file of tensors as bytes: what safetensors would not write can be written here."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch


@dataclass
class ShardBytes:
    """The header, as JSON says it, and the bytes of the tensors behind it."""

    header: dict[str, Any]
    data: bytearray

    @classmethod
    def read(cls, file: Path) -> Self:
        raw = file.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        return cls(json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :]))

    def write(self, file: Path) -> None:
        header = json.dumps(self.header, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        file.write_bytes(struct.pack("<Q", len(header)) + header + self.data)

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        return {name: row for name, row in self.header.items() if name != "__metadata__"}

    def bytes_of(self, name: str) -> bytes:
        begin, end = self.header[name]["data_offsets"]
        return bytes(self.data[begin:end])

    def remove(self, name: str) -> None:
        """Leave out a tensor with its bytes."""
        begin, end = self.header.pop(name)["data_offsets"]
        del self.data[begin:end]
        for row in self.tensors.values():
            if row["data_offsets"][0] >= end:
                row["data_offsets"] = [place - (end - begin) for place in row["data_offsets"]]

    def add(self, name: str, like: str) -> None:
        """Append a tensor of ones with the type and shape of another."""
        row = self.header[like]
        begin, size = len(self.data), len(self.bytes_of(like))
        self.header[name] = {**row, "data_offsets": [begin, begin + size]}
        self.data += bytes(torch.ones(size, dtype=torch.uint8).numpy())

"""Text that every machine has: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

_BYTES = 1 << 20


class Corpus:
    """Batches of random windows of the text, the same on every process and in every run."""

    def __init__(self, seed: int = 0) -> None:
        text, self.num_files = _text()
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and the bytes that follow them: two `[size, length]` tensors of int64."""
        last = len(self.bytes) - length - 1
        starts = torch.randint(0, last, (size, 1), generator=self._generator)
        windows = self.bytes[starts + torch.arange(length + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _text() -> tuple[bytes, int]:
    """The first megabyte of the library's modules, in alphabetical order, and their number."""
    parts: list[bytes] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(path.read_bytes())
        if sum(map(len, parts)) >= _BYTES:
            break
    return b"".join(parts)[:_BYTES], len(parts)

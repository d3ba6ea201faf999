"""The rates by which choices within a budget are compared, and where they are from.

All are operations: those that an accelerator does in the time of something else. They are of an
NVIDIA H100 SXM: of 989 TFLOP/s in bfloat16 on its data sheet, training reaches about 400. Of the
64 GB/s of its PCIe 5 in either direction, copies of pinned memory reach about 50, and of the 50
GB/s of a 400 Gb/s network adapter per device, messages nearly all. Its memory reads 3.35 TB/s.
"""

from __future__ import annotations

SENT = 8_000
"""Operations in the time in which a rank sends a byte to another: 400 TFLOP/s, 50 GB/s."""
MOVED = 8_000
"""Operations in the time in which a byte moves between the device and host memory, one way: 400
TFLOP/s, 50 GB/s."""
STORED = 80_000
"""Operations in the time in which a byte is written to a file, or read: 400 TFLOP/s, 5 GB/s."""
READ = 130
"""Operations in the time in which a byte of the device's memory is read: 400 TFLOP/s, 3 TB/s."""


UPDATED = 8_000
"""Operations in the time in which the CPU updates a byte of states that it keeps: 400 TFLOP/s, and
of the memory of a host with two processors, 100 GB/s for each of eight devices, read and written.
"""


def moving(num_bytes: int, path: str | None = None) -> int:
    """The operations in the time in which bytes move between the device and where `offload` keeps
    them: host memory or, with `path`, files."""
    return num_bytes * (MOVED if path is None else STORED)

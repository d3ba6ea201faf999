"""One rank of `test_transfers.py`: transfers to the next rank and back; prints what went wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Wire
from meshwright.runtime.errors import RunError
from meshwright.runtime.transports.process import Handle, ProcessMesh

FORWARD, BACKWARD = (
    Wire("transfer", ("pp",), ends=ends, channel=channel)
    for ends, channel in (((0, 1), "forward"), ((1, 0), "backward"))
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (3,), (0, 4), (5, 7), (700, 1001))
DTYPES = (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
LARGE = 64 * 2**20


def operands() -> Iterator[Tensor]:
    """Of every shape and type, transposed, so that those of two dims are not contiguous."""
    seed = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for dtype in DTYPES:
            values = torch.randn(shape[::-1], generator=seed, dtype=torch.float64) * 9
            tensor = values > 0 if dtype is torch.bool else values.to(dtype)
            yield tensor.mT if tensor.dim() == 2 else tensor


def every(transport: ProcessMesh) -> None:
    """Both ends start all that they send and receive, and then wait, in the opposite order."""
    rank = transport.rank
    sent = list(operands())
    started: list[tuple[Handle, Tensor, Tensor]] = []
    for wire in (FORWARD, BACKWARD):
        for tensor in sent:
            source = wire.ends is not None and wire.ends[0] == rank
            given = tensor if source else torch.zeros(tensor.shape, dtype=tensor.dtype)
            started.append((transport.start(wire, given), given, tensor))
    time.sleep(0.1 * rank)
    for handle, given, tensor in reversed(started):
        got = transport.wait(handle)
        if not (got.equal(tensor) and given.equal(tensor)):
            print("differs:", tensor.dtype, tensor.shape)
        if given.is_contiguous() and got is not given:
            print("copied:", tensor.dtype, tensor.shape)


def large(transport: ProcessMesh) -> None:
    """More than any buffer on the way holds, both ways at once, before anything is received."""
    sends, receives = (FORWARD, BACKWARD)[:: 1 - 2 * transport.rank]
    mine = torch.full((LARGE,), 1 + transport.rank, dtype=torch.uint8)
    begin = time.monotonic()
    started = [transport.start(sends, mine) for _ in range(2)]
    if time.monotonic() - begin > 30:
        print("a start waited")
    buffers = [torch.zeros(LARGE, dtype=torch.uint8) for _ in range(2)]
    handles = [transport.start(receives, buffer) for buffer in buffers]
    for handle in (*started, *handles):
        transport.wait(handle)
    if not all((buffer == 2 - transport.rank).all() for buffer in buffers):
        print("differs: 64 MiB")


def circle(transport: ProcessMesh) -> None:
    """Each rank receives from the next, and nobody sends."""
    rank, size = transport.rank, transport.mesh.num_ranks
    wire = Wire("transfer", ("pp",), ends=((rank + 1) % size, rank), channel="forward")
    transport.wait(transport.start(wire, torch.zeros(3)))


def killed(transport: ProcessMesh) -> None:
    """The rank in the middle is killed before it receives."""
    rank = transport.rank
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    wire = Wire("transfer", ("pp",), ends=(1, 2) if rank else (0, 1), channel="forward")
    transport.wait(transport.start(wire, torch.zeros(LARGE, dtype=torch.uint8)))


def other(transport: ProcessMesh) -> None:
    """The target expects fewer elements than the source sends."""
    transport.wait(transport.start(FORWARD, torch.zeros(3 - transport.rank)))


CASES = {case.__name__: case for case in (every, large, circle, killed, other)}


def main(*names: str) -> None:
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    transport = ProcessMesh(Mesh((("pp", size),)), period=0.4, patience=2.0)
    ends = [(a, b) for a in range(size) for b in range(size) if a != b]
    kinds = ("forward", "backward")
    transport.connect(Wire("transfer", ("pp",), ends=e, channel=k) for k in kinds for e in ends)
    for name in names:
        try:
            CASES[name](transport)
        except RunError as error:
            print(f"{type(error).__name__}: {error}")
            transport.close(error)
            return
        print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One rank of `test_shared.py`: what is particular to shared memory; prints the case when done."""

from __future__ import annotations

import os
import signal
import time

import torch

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Wire
from meshwright.runtime.transports import shared
from meshwright.runtime.transports.process import ProcessMesh
from meshwright.runtime.transports.shared import SLOTS, SharedGroup

AXES = ("tp",)
SUM, GATHER, BROADCAST = (Wire(kind, AXES) for kind in ("all_reduce", "all_gather", "broadcast"))


def backwards(transport: ProcessMesh) -> None:
    """Many more starts than slots, waited for in the opposite order and at other times."""
    size, rank = transport.mesh.num_ranks, transport.rank
    for turn in range(3):
        given = [torch.full((300,), float(rank + i)) for i in range(5 * SLOTS)]
        handles = [
            transport.start(SUM, tensor, donate=bool(i % 2)) for i, tensor in enumerate(given)
        ]
        time.sleep(0.02 * ((rank + turn) % 2))
        for i in reversed(range(len(handles))):
            got = transport.wait(handles[i])
            assert (got == size * i + size * (size - 1) / 2).all(), (i, got)


def apart(transport: ProcessMesh) -> None:
    """The members of one group wait for their collectives in different orders."""
    rank = transport.rank
    for count in (SLOTS, 3 * SLOTS):
        handles = [transport.start(GATHER, torch.tensor([10 * rank + i])) for i in range(count)]
        order = sorted(range(count), key=lambda i: (i * (7 + 4 * rank)) % 23)
        for i in order:
            got = transport.wait(handles[i])
            assert got.flatten().tolist() == [10 * r + i for r in range(len(got))], (i, got)


def ahead(transport: ProcessMesh) -> None:
    """The root of broadcasts starts more than there are slots before any other rank comes."""
    if transport.rank:
        time.sleep(0.2)
    tensors = [torch.full((7,), i + 100 * (transport.rank > 0)) for i in range(4 * SLOTS)]
    handles = [transport.start(BROADCAST, tensor) for tensor in tensors]
    if not transport.rank:
        # Computes while the others come: they get the last ones without its help.
        time.sleep(1.0)
    begin = time.monotonic()
    for i, handle in enumerate(handles):
        assert (transport.wait(handle) == i).all()
    assert time.monotonic() - begin < 0.7


def modes(transport: ProcessMesh) -> None:
    """Operands in inference mode, that require gradients, and that are donated."""
    ones = torch.ones(5, requires_grad=True)
    with torch.inference_mode():
        assert (transport.collective(SUM, ones.detach()) == transport.mesh.num_ranks).all()
        given = [torch.ones(5) for _ in range(4 * SLOTS)]
        handles = [transport.start(SUM, tensor, donate=True) for tensor in given]
        for handle in reversed(handles):
            assert (transport.wait(handle) == transport.mesh.num_ranks).all()
    for _ in range(2 * SLOTS):
        got = transport.collective(SUM, ones)
        assert (got == transport.mesh.num_ranks).all()
        assert not got.requires_grad
        donated = torch.ones(5)
        assert transport.collective(SUM, donated, donate=True) is not None
        assert (donated == transport.mesh.num_ranks).all()


def other(transport: ProcessMesh) -> None:
    """Members that ask for different operations."""
    transport.collective(GATHER if transport.rank else SUM, torch.ones(3))


def killed(transport: ProcessMesh) -> None:
    """All ranks end as if killed for their memory."""
    transport.collective(SUM, torch.ones(3))
    print("killed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def unshared(transport: ProcessMesh) -> None:
    """One member does not want shared memory, or cannot have it: nobody uses it."""
    lane = transport.lanes[AXES]
    assert not isinstance(lane.group, SharedGroup)
    assert (transport.collective(SUM, torch.ones(3)) == transport.mesh.num_ranks).all()


def crowded(transport: ProcessMesh) -> None:
    """One member may use a single core: each sleeps until another wakes it."""
    group = transport.lanes[AXES].group
    assert isinstance(group, SharedGroup)
    assert group.crowded
    shared._LONGEST_SLEEP = 10.0
    begin = time.monotonic()
    for turn in range(6):
        time.sleep(0.05 * ((transport.rank + turn) % 2))
        assert transport.collective(SUM, torch.ones(3)).tolist() == [2.0] * 3
    assert time.monotonic() - begin < 8


def unable(process: int, flags: int = 0) -> int:
    raise OSError(f"process {process} cannot be seen")


CASES = {
    case.__name__: case
    for case in (backwards, apart, ahead, modes, other, killed, unshared, crowded)
}


def main(*names: str) -> None:
    torch.set_num_threads(1)
    mesh = Mesh((("tp", int(os.environ["WORLD_SIZE"])),))
    wanted = True
    if names[0] == "unshared" and os.environ["RANK"] == "1":
        wanted = names[1] != "unwanted"
        os.pidfd_open = unable
    if names[0] == "crowded" and os.environ["RANK"] == "1":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    transport = ProcessMesh(mesh, shared_memory=wanted)
    transport.collective(Wire("all_gather", AXES), torch.zeros(1))
    if names[0] == "unshared":
        names = names[:1]
    else:
        assert isinstance(transport.lanes[AXES].group, SharedGroup)
    for name in names:
        CASES[name](transport)
        print(name, flush=True)

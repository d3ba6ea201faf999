"""The two transports under one executor: every rank in this process, or one rank per process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.errors import RunError
from meshwright.runtime.rank import RankProgram
from meshwright.runtime.transports.process import ProcessTransport
from meshwright.runtime.transports.virtual import run_virtual
from meshwright.runtime.world.rendezvous import under_torchrun

_MOST_VIRTUAL_RANKS = 4096


class Transport(Protocol):
    """Runs one generator for each of `ranks`, which are those that live in this process.

    With `has_every_rank`, all ranks are here and given the same inputs and weights; otherwise each
    process brings its own, which have to agree.
    """

    ranks: tuple[int, ...]
    has_every_rank: bool

    def run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        """The results of the generators; `names[i]` is the node of collective i, for errors."""
        ...

    def check_same_program(self, digest: str) -> None:
        """Raise `MismatchError` on every rank unless all give the same digest."""
        ...

    def close(self, error: BaseException | None = None) -> None:
        """Leave the mesh; the `error` that ends this rank is told to the others."""
        ...


def transport_of(mesh: Mesh, device: torch.device) -> Transport:
    """The process mesh where this process is one rank of many, else the virtual mesh."""
    return ProcessMesh(mesh, device) if under_torchrun() else VirtualMesh(mesh)


class VirtualMesh:
    """Every rank of the mesh in this process."""

    has_every_rank = True

    def __init__(self, mesh: Mesh) -> None:
        if mesh.num_ranks > _MOST_VIRTUAL_RANKS:
            raise RunError(
                f"the mesh has {mesh.num_ranks} ranks, and one process runs at most "
                f"{_MOST_VIRTUAL_RANKS}",
                help="start a process for each rank with `meshwright run` or torchrun",
            )
        self.mesh = mesh
        self.ranks: tuple[int, ...] = tuple(range(mesh.num_ranks))

    def __repr__(self) -> str:
        return f"<VirtualMesh {self.mesh}: {len(self.ranks)} ranks in this process>"

    def run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        """Drive all ranks to their ends."""
        return run_virtual(programs, self.mesh, names)

    def check_same_program(self, digest: str) -> None:
        """There is one program here."""

    def close(self, error: BaseException | None = None) -> None:
        """There is nothing to leave."""


class ProcessMesh:
    """This process is one rank, among those that torchrun started."""

    has_every_rank = False

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.process = ProcessTransport(mesh, device)
        self.ranks: tuple[int, ...] = (self.process.rank,)

    def __repr__(self) -> str:
        return f"<ProcessMesh: this process is rank {self.process.rank}>"

    def run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        """Drive this rank to its end."""
        (program,) = programs
        return [self.process.run(program, names)]

    def check_same_program(self, digest: str) -> None:
        """Compare digests over all ranks."""
        self.process.check_same_program(digest)

    def close(self, error: BaseException | None = None) -> None:
        """Say how this rank ended, and free its groups."""
        if error is not None:
            self.process.watch.publish_end(error)
        self.process.close()


def check_device(device: torch.device) -> None:
    """Raise `RunError` where there is no such device here, or fewer of them than processes."""
    if device.type != "cuda":
        return
    found, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0")) + 1
    if found < wanted:
        raise RunError(
            f"the program is compiled for `{device}`; {found} such devices are here, "
            f"and this process needs number {wanted}",
            help='compile with `device="cpu"`, or start as many processes as there are devices',
        )

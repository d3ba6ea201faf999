"""The two transports under one executor: every rank in this process, or one rank per process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import Wire
from meshwright.runtime.errors import RunError
from meshwright.runtime.rank import RankProgram
from meshwright.runtime.transports.process import ProcessMesh
from meshwright.runtime.transports.staged import asked_for
from meshwright.runtime.transports.virtual import VirtualMesh
from meshwright.runtime.world.rendezvous import under_torchrun


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

    def connect(self, wires: Iterable[Wire]) -> None:
        """Connect the ends of all transfers of a program, the same on every rank, so that no start
        waits for its peer."""
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


def check_device(device: torch.device) -> None:
    """Raise `RunError` where there is no such device here, or fewer of them than processes."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise RunError(
            f"the program is compiled for `{device}`, and a run computes on `cpu` or `cuda`",
            help='compile with `device="cpu"` or `"cuda"`; `memory()` needs no device',
        )
    place = 0 if asked_for() else int(os.environ.get("LOCAL_RANK", "0"))
    found, wanted = torch.cuda.device_count(), place + 1
    if found < wanted:
        raise RunError(
            f"the program is compiled for `{device}`; {found} such devices are here, "
            f"and this process needs number {wanted}",
            help='compile with `device="cpu"`, start as many processes as there are devices, or '
            "set `MESHWRIGHT_THROUGH_HOST=1` in the environment: ranks then share devices",
        )

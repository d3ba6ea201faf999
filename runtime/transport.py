"""The two transports under one executor: every rank in this process, or one rank a process."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import torch

from meshwright.compiler.mesh import Mesh
from meshwright.runtime.process import ProcessTransport
from meshwright.runtime.virtual import run_virtual

RankProgram = Generator[Any, Any, Any]


class Transport(Protocol):
    """Runs one generator for each of `ranks`, which are those that live in this process."""

    ranks: tuple[int, ...]

    def run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        """What each generator returned; `names[i]` is the node of collective i, for errors."""
        ...


class VirtualMesh:
    """Every rank of the mesh in this process."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.ranks = mesh, tuple(range(mesh.num_ranks))

    def run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        """Drive all ranks to their ends."""
        return run_virtual(programs, self.mesh, names)


class ProcessMesh:
    """This process is one rank, among those that torchrun started."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.process = ProcessTransport(mesh, device)
        self.ranks = (self.process.rank,)

    def run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        """Drive this rank to its end."""
        (program,) = programs
        return [self.process.run(program, names)]


def under_torchrun() -> bool:
    """Whether this process was started as one rank of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ

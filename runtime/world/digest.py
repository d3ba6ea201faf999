"""Checks at the start: as many processes as ranks, and the same program on each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.errors import MismatchError, RunError, by_value, spell_ranks


def check_world(mesh: Mesh, num_processes: int) -> None:
    """Raise `RunError` unless there is one process for each rank of the mesh."""
    if num_processes == mesh.num_ranks:
        return
    processes = "1 process runs" if num_processes == 1 else f"{num_processes} processes run"
    ranks = "1 rank" if mesh.num_ranks == 1 else f"{mesh.num_ranks} ranks"
    raise RunError(
        f"the mesh `{mesh}` has {ranks}, but {processes}",
        help=f"start {mesh.num_ranks} processes (`torchrun --nproc-per-node {mesh.num_ranks}`), "
        "or change the mesh",
    )


def check_digests(digests: Sequence[str], rank: int) -> None:
    """Raise `MismatchError` unless every rank has the same digest; `digests` is by rank."""
    usual, *others = by_value(range(len(digests)), digests)
    if not others:
        return
    different = sorted(itertools.chain(*others))
    raise MismatchError(
        f"{spell_ranks(different)} compiled a different program than {spell_ranks(usual)}",
        rank=rank,
        peers=tuple(different),
        where=[f"{spell_ranks(own)}: digest {digests[own[0]][:12]}" for own in (usual, *others)],
        help="give every rank the same model, plan, example, backend and versions, and the same "
        "seeds where the model draws numbers in Python",
    )

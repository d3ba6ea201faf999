"""The start-up checks: as many processes as ranks, and the same program on each."""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.errors import MismatchError, RunError, spell_ranks


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
    holders: dict[str, list[int]] = {}
    for holder, digest in enumerate(digests):
        holders.setdefault(digest, []).append(holder)
    if len(holders) == 1:
        return
    # The largest set of equal ranks is taken to be right, the one of the lowest rank if in doubt.
    usual = max(holders, key=lambda digest: len(holders[digest]))
    different = [holder for holder, digest in enumerate(digests) if digest != usual]
    raise MismatchError(
        f"{spell_ranks(different)} compiled a different program than {spell_ranks(holders[usual])}",
        rank=rank,
        peers=tuple(different),
        where=[f"{spell_ranks(ranks)}: digest {digest[:12]}" for digest, ranks in holders.items()],
        help="give every rank the same model, plan, example and versions, and the same seeds where "
        "the model draws numbers in Python",
    )

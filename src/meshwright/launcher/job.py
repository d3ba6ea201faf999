"""What to launch: a script, in how many processes, on which of how many machines."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path

GRACE = 8.0
"""Seconds that ranks have to end once told to; less than the ten of `docker stop`."""


@dataclass(frozen=True, slots=True)
class Job:
    """A script with its arguments, or `-m` and a module with its own, and the ranks to run it.

    `rendezvous` is where the ranks of multiple machines meet, `host:port` of node 0; `node` is this
    machine's place among `nodes`. `logs` is the folder of the ranks' output.
    """

    script: tuple[str, ...]
    processes: int
    logs: Path | None = None
    grace: float = GRACE
    nodes: int = 1
    node: int = 0
    rendezvous: tuple[str, int] | None = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def ranks(self) -> range:
        """The ranks of this machine."""
        return range(self.node * self.processes, (self.node + 1) * self.processes)

    @property
    def world(self) -> int:
        return self.nodes * self.processes

    def environment(self, rank: int, host: str, port: int) -> dict[str, str]:
        """The variables of one rank: those of torchrun, so that a script sees no difference."""
        local = {
            "RANK": rank,
            "LOCAL_RANK": rank - self.ranks.start,
            "WORLD_SIZE": self.world,
            "LOCAL_WORLD_SIZE": self.processes,
            "GROUP_RANK": self.node,
            "GROUP_WORLD_SIZE": self.nodes,
            "ROLE_NAME": "default",
            "ROLE_RANK": rank,
            "ROLE_WORLD_SIZE": self.world,
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": self.name,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": 0,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        defaults = {"OMP_NUM_THREADS": str(threads), "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
        return {**defaults, **os.environ, **{key: str(value) for key, value in local.items()}}

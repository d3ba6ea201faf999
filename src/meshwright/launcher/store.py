"""Where ranks meet: a store in the launcher's process, so that it outlives every rank."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from meshwright.launcher.job import Job
from meshwright.models import CommandError

_SECONDS_TO_MEET = 600.0
_SECONDS_TO_END = 300.0
_SECONDS_AFTER_FAILURE = 10.0
"""How long node 0 keeps the store for ranks of other machines, which read there what happened."""


@dataclass(slots=True)
class MeetingPlace:
    """The host and port of the store; `failed` unless all ranks of this machine end well."""

    host: str
    port: int
    failed: bool = True


@contextlib.contextmanager
def meeting_place(job: Job) -> Iterator[MeetingPlace]:
    """A store that node 0's launcher keeps for as long as ranks of any machine may need it.

    Raises `CommandError` where it cannot be opened or reached.
    """
    host, port = job.rendezvous or ("localhost", 0)
    is_host = job.node == 0
    if not is_host:
        _wait_for(host, port)
    try:
        store = TCPStore(
            host,
            port,
            is_master=is_host,
            wait_for_workers=False,
            timeout=timedelta(seconds=_SECONDS_TO_MEET),
        )
    except RuntimeError as error:
        raise CommandError(
            f"cannot open the ranks' meeting place at `{host}:{port}`: {_reason(error)}",
            help="choose a port of this machine that is free, from 1024 to 65535",
        ) from None
    if store.add(f"launcher/node/{job.node}", 1) > 1:
        raise CommandError(
            f"node {job.node} has been launched at `{host}:{port}` already",
            help=f"give each machine its own `--node-rank`, from 0 to {job.nodes - 1}",
        )
    place = MeetingPlace(host, store.port)
    try:
        yield place
    finally:
        _part(store, job, _SECONDS_AFTER_FAILURE if place.failed else _SECONDS_TO_END)


def _wait_for(host: str, port: int) -> None:
    """Wait for node 0, in steps between which signals are handled."""
    end = time.monotonic() + _SECONDS_TO_MEET
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() > end:
                raise CommandError(
                    f"cannot reach node 0 at `{host}:{port}`: {_reason(error)}",
                    help="start node 0 there, and give every machine its address and port",
                ) from None
        time.sleep(0.2)


def _part(store: TCPStore, job: Job, patience: float) -> None:
    """Say that this machine has ended; node 0 stays until the others have."""
    with contextlib.suppress(RuntimeError):
        ended = store.add("launcher/ended", 1)
        end = time.monotonic() + patience
        while job.node == 0 and ended < job.nodes and time.monotonic() < end:
            time.sleep(0.05)
            ended = store.add("launcher/ended", 0)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    text = str(error).lower()
    return "the port is in use" if "in use" in text else text.partition("\n")[0]

"""The meeting of ranks: what their environment says, the store that it names, and who has come.

The store's calls block in C++, some of them for ever. They run in a thread of their own, so
that the main thread can be interrupted, say whom it waits for, and give up.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from meshwright.dsl.errors import spelled
from meshwright.runtime.errors import PeerError, RunError, spell_ranks, verb
from meshwright.runtime.world.termination import say

T = TypeVar("T")

LIMIT = "MESHWRIGHT_RENDEZVOUS_SECONDS"
_SECONDS, _AGENT_SECONDS, _QUIET_SECONDS = 600.0, 30.0, 30.0
"""Until a rank gives up those that have not come, until it gives up the launcher, which is there
before them, and until it says whom it waits for."""
_STAY_SECONDS = 5.0
"""For which the rank that keeps the store stays at most, for others to read why it ends."""
_TORCHRUN = "start the script with `torchrun`, which sets it"


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among those of the run, and where they meet."""

    rank: int
    size: int
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def under_torchrun() -> bool:
    """Whether this process is one rank of many, by its environment or its process group.

    Raises `RunError` where the environment gives a rank but no size, or a size but no rank.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return True
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(given) == 1:
        (missing,) = {"RANK", "WORLD_SIZE"} - set(given)
        raise RunError(
            f"`{given[0]}` is in the environment and `{missing}` is not",
            help=f"{_TORCHRUN}, or remove both for the virtual mesh",
        )
    return bool(given)


def place() -> tuple[int, int]:
    """Rank and world size: those of the default process group, else of the environment."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    size = _number("WORLD_SIZE", 1, math.inf)
    return _number("RANK", 0, size), size


def host_rank() -> int | None:
    """The rank whose process holds the store; None where the launcher's does."""
    return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0


def _number(name: str, least: int, end: float) -> int:
    text = os.environ.get(name)
    if text is None:
        raise RunError(f"`{name}` is not in the environment", help=_TORCHRUN)
    if text.strip().isascii() and text.strip().isdigit() and least <= int(text) < end:
        return int(text)
    above = f"{least} or more" if math.isinf(end) else f"{least} to {int(end) - 1}"
    raise RunError(f"`{name}` is {spelled(text)}, not a number of {above}", help=_TORCHRUN)


def _world() -> World:
    rank, size = place()
    address = os.environ.get("MASTER_ADDR", "")
    if not address:
        raise RunError(
            "`MASTER_ADDR` is not in the environment",
            help=f"{_TORCHRUN}, or set it to the host of rank 0",
        )
    return World(rank, size, address, _number("MASTER_PORT", 1, 2**16))


class Limit:
    """The time that ranks have to meet: `MESHWRIGHT_RENDEZVOUS_SECONDS`, or ten minutes."""

    def __init__(self) -> None:
        text = os.environ.get(LIMIT, str(_SECONDS))
        try:
            self.seconds = float(text)
        except ValueError:
            self.seconds = math.nan
        if not 0 < self.seconds < math.inf:
            raise RunError(
                f"`{LIMIT}` is {spelled(text)}", help=f"set `{LIMIT}` to a number of seconds"
            )
        self.begin = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.begin + self.seconds - time.monotonic()

    def patiently(self, work: Callable[[], T], waits_for: Callable[[], str]) -> T | None:
        """Do `work` in a thread, and return what it returns, or None at the limit.

        After a while it says on standard error what it `waits_for`; at the limit the thread is
        abandoned.
        """
        found: list[T] = []
        raised: list[RuntimeError] = []
        done = threading.Event()

        def target() -> None:
            try:
                found.append(work())
            except RuntimeError as error:
                raised.append(error)
            finally:
                done.set()

        threading.Thread(target=target, name="rendezvous", daemon=True).start()
        quiet = True
        while not done.wait(0.1) and self.left > 0:
            waited = time.monotonic() - self.begin
            if quiet and waited > _QUIET_SECONDS:
                quiet = False
                say(f"meshwright: {waits_for()}, for {waited:.0f} of {self.seconds:.0f} s")
        if raised:
            raise raised[0]
        return found[0] if found else None


_store: Store | None = None


def connect(limit: Limit) -> Store:
    """The store that all ranks meet at, one connection per process.

    Raises `RunError` for an environment that names none, and where it cannot be reached in time.
    """
    global _store
    if dist.is_available() and dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if _store is None:
        world = _world()
        tcp = (_serve if world.rank == host_rank() else _reach)(world, limit)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _store = PrefixStore(f"attempt/{attempt}", tcp)
    return _store


def _serve(world: World, limit: Limit) -> Store:
    """The store, which this process keeps for all others to reach at the world's address."""
    try:
        found = limit.patiently(
            lambda: _tcp(world, limit, serve=True),
            lambda: f"rank {world.rank} tries to reach itself at `{world}`",
        )
    except RuntimeError as error:
        if os.strerror(errno.EADDRINUSE).lower() in str(error).lower() or "EADDRINUSE" in str(
            error
        ):
            raise RunError(
                f"rank {world.rank} cannot keep the store of the run: port {world.port} "
                "(`MASTER_PORT`) is taken",
                help="set `MASTER_PORT` to a free port, the same on every rank; "
                "`torchrun --standalone` finds one by itself",
            ) from None
        raise _unreachable(world, limit, str(error).partition("\n")[0]) from None
    if found is None:
        raise _unreachable(world, limit, "no answer")
    return found


def _reach(world: World, limit: Limit) -> Store:
    """The store that rank 0 or the launcher keeps, as soon as it is there."""
    reason = ["no answer"]
    seconds = limit.seconds if host_rank() is not None else min(_AGENT_SECONDS, limit.seconds)

    def work() -> Store | None:
        # A plain connection first: the store's own reports every failed attempt at length.
        while time.monotonic() < limit.begin + seconds:
            try:
                socket.create_connection((world.address, world.port), timeout=2.0).close()
                break
            except OSError as error:
                reason[0] = error.strerror or str(error) or "no answer"
                time.sleep(0.1)
        else:
            return None
        reason[0] = "what answers there is not the store of a run"
        return _tcp(world, limit, serve=False)

    try:
        found = limit.patiently(
            work, lambda: f"rank {world.rank} waits for {_keeper()} at `{world}`: {reason[0]}"
        )
    except RuntimeError:
        found = None
    if found is None:
        raise _unreachable(world, limit, reason[0])
    return found


def _tcp(world: World, limit: Limit, *, serve: bool) -> Store:
    left = timedelta(seconds=max(limit.left, 1.0))
    return TCPStore(world.address, world.port, world.size, serve, left, wait_for_workers=False)


def _keeper() -> str:
    return "the launcher" if host_rank() is None else "rank 0"


def _unreachable(world: World, limit: Limit, reason: str) -> RunError:
    waited = time.monotonic() - limit.begin
    problem = f"rank {world.rank} cannot reach {_keeper()} at `{world}` after {waited:.0f} s"
    if host_rank() is None:
        help = (
            "read the output of the launcher: it has ended, or its port cannot be reached from here"
        )
    else:
        help = (
            "check that rank 0 has come to `launch`, and give every rank its host in "
            "`MASTER_ADDR` and one free port in `MASTER_PORT`"
        )
    return RunError(f"{problem}: {reason}", rank=world.rank, help=help)


def meet(store: Store, rank: int, num_ranks: int, limit: Limit, texts: dict[str, str]) -> None:
    """Publish `texts` as `<name>/<rank>`, and wait until every other rank has done so.

    Raises `PeerError` that names those who have not come in time.
    """
    peers = [peer for peer in range(num_ranks) if peer != rank]
    missing = list(peers)
    last = list(texts)[-1]
    told: list[str] = []

    def work() -> bool:
        for name, text in texts.items():
            store.set(f"{name}/{rank}", text)
        pause = 0.002
        while missing and not told:
            missing[:] = [peer for peer in missing if not store.check([f"{last}/{peer}"])]
            if store.check(["gave up"]):
                told.append(store.get("gave up").decode())
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        return True

    def waits_for() -> str:
        return f"rank {rank} waits in `launch` for {spell_ranks(missing)}"

    try:
        done = limit.patiently(work, waits_for)
    except RuntimeError as error:
        raise _lost_store(rank, str(error).partition("\n")[0]) from None
    if done and not told:
        return

    def all_know() -> bool:
        come = [peer for peer in peers if store.check([f"{last}/{peer}"])]
        return all(store.check([f"gave up/{peer}"]) for peer in come)

    _give_up(store, rank, missing, limit, told, all_know)


def _give_up(
    store: Store,
    rank: int,
    missing: Sequence[int],
    limit: Limit,
    told: Sequence[str],
    all_know: Callable[[], bool],
) -> NoReturn:
    """Raise `PeerError`, and first tell the others, whose time may end later; the rank that keeps
    the store stays until `all_know`."""
    if told:
        problem, *names = told[0].split("|")
        absent = [int(name) for name in names]
    else:
        absent = list(missing)
        problem = f"{verb(absent, 'has', 'have')} not come to `launch` within {limit.seconds:.0f} s"
    text = "|".join([problem, *map(str, absent)])
    keeps = rank == host_rank()

    def tell() -> None:
        store.set("gave up", text)
        store.set(f"gave up/{rank}", "")
        while keeps and not all_know():
            time.sleep(0.02)

    _briefly(tell, _STAY_SECONDS if keeps else 1.0)
    slow = "it only takes" if len(absent) == 1 else "they only take"
    raise PeerError(
        problem,
        rank=rank,
        peers=tuple(absent),
        help=f"read the output of {spell_ranks(absent)}; where {slow} longer, raise "
        f"`{LIMIT}` on every rank",
    )


def _briefly(work: Callable[[], Any], seconds: float) -> None:
    """Do `work` in a thread, which is abandoned after `seconds`."""

    def target() -> None:
        with contextlib.suppress(RuntimeError):
            work()

    thread = threading.Thread(target=target, name="rendezvous", daemon=True)
    thread.start()
    thread.join(seconds)


def _lost_store(rank: int, reason: str) -> PeerError:
    host = host_rank()
    return PeerError(
        f"{_keeper()}, which keeps the store of the run, has ended before all ranks had come",
        rank=rank,
        peers=() if host is None else (host,),
        where=(reason,),
        help=f"read the output of {_keeper()}",
    )

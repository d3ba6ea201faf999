"""Heartbeats through the store: every rank tells what it is doing, so that none waits in vain.

One thread publishes and reads once a second; a second one judges, so that a store that hangs is
noticed too. Computing is never limited: a rank is only judged while another waits for it, by a
heartbeat that stops, or by waiting that goes round in a circle.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch._C._distributed_c10d import Store

from meshwright.compiler.layout.wires import Wire
from meshwright.runtime.errors import (
    CALL_SAME_METHODS,
    DeadlockError,
    PeerError,
    RunError,
    ToldToStop,
    last_words,
    spell_ranks,
    spell_wire,
    verb,
)
from meshwright.runtime.world.connections import Connection
from meshwright.runtime.world.termination import EXIT_CODE, say

Waits = tuple[str, int, Wire]
"""What a rank waits for: the label of a group of axes, the place in its order, the operation."""

_READ_OUTPUT = "read the end of its output; the system's log names what was killed for its memory"
_LOOK_AT_PROCESS = "check whether its process is stopped, or its machine out of reach"
_RUN_SAME_STEPS = "run the same number of steps on every rank"
_ENDS = {
    "failed": "read its own traceback",
    "left": "look for what ended it in its output; the other ranks cannot go on without it",
}
"""The states of ranks that did not reach the end of their program, and what to do then."""


@dataclass(slots=True)
class Beat:
    """One rank's last heartbeat; `changed` is the local time at which it last moved."""

    number: int = -1
    state: str = "running"
    label: str = ""
    order: int = -1
    doing: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    problem: str = ""
    help: str = ""
    peers: list[int] = field(default_factory=list)
    circle: list[str] = field(default_factory=list)
    changed: float = 0.0

    @property
    def waits(self) -> bool:
        return self.state == "running" and bool(self.label)


class Watch:
    """This rank's heartbeat and its view of the others'.

    The main thread only writes `waits` and `counts` around its collectives, so that a collective
    pays for two assignments. `aborts` end whatever the main thread waits in.
    `host` is the rank whose process holds the store, if a rank's does, and `connection` that to it.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        peers: Sequence[int],
        host: int | None,
        connection: Connection | None = None,
        *,
        period: float,
        patience: float,
    ) -> None:
        self.store, self.rank, self.peers, self.host = store, rank, tuple(peers), host
        self.connection = connection
        self.period, self.patience = period, patience
        self.waits: Waits | None = None
        self.counts: dict[str, int] = {}
        self.names: Sequence[str] = ()
        self.members: dict[str, Callable[[int], tuple[int, ...]]] = {}
        self.aborts: list[Callable[[], None]] = []
        self.beats: dict[int, Beat] = {}
        self.failure: RunError | None = None
        self.failed = threading.Event()
        self.state, self.problem = "running", ""
        self._help, self._peers = "", list[int]()
        self._number = 0
        self.signals: Callable[[], bool] = bool
        self.told_at = 0.0
        self._closed_at = 0.0
        self._answered = time.monotonic()
        self._circle: tuple[Any, int] = (None, 0)
        self._told_circle: list[str] = []
        self._left, self._stopping, self._hurry = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(
            target=self._publish_and_read, name="heartbeat", daemon=True
        )
        self._judge_thread = threading.Thread(
            target=self._judge, name="heartbeat judge", daemon=True
        )

    def start(self) -> None:
        """Begin once every rank has published its first beat (the caller meets them before)."""
        now = self._answered = time.monotonic()
        self.beats = {peer: Beat(changed=now) for peer in self.peers}
        self._thread.start()
        self._judge_thread.start()

    def leave(self, state: str, problem: str) -> None:
        """Publish the last state, "finished", "failed", "left" or "lost", and judge no more."""
        self.state, self.problem = state, problem
        self._left.set()
        self._hurry.set()
        self._judge_thread.join(timeout=self.patience)

    def linger(self, seconds: float, *, whole: bool = False) -> None:
        """Stay until no other rank runs, at most `seconds` from when one last moved or, with
        `whole`, from now.

        The store of the run may be this process's, and others may still need its last bytes.
        """
        begin = time.monotonic()
        while self._thread.is_alive() and not self.store_ended():
            running = [beat for beat in self.beats.values() if beat.state == "running"]
            moved = begin if whole else max([begin, *(beat.changed for beat in running)])
            if not running or time.monotonic() - moved > seconds:
                return
            time.sleep(0.02)

    def stop(self) -> None:
        """Publish a last time and end the heartbeat; abandon a thread that the store blocks."""
        self._stopping.set()
        self._hurry.set()
        self._thread.join(timeout=self.patience)

    def publish_end(self, error: BaseException) -> None:
        """Tell the others at once what ends this rank; only the first call counts."""
        if self.state == "running":
            self.state, self.problem = last_words(error)
        self._hurry.set()

    def told_to_stop(self) -> None:
        """Note that another process wants this one to end, which it does when its wait ends."""
        if self.state == "running" and not self.told_at:
            self.told_at = self._closed_at = time.monotonic()
            self._hurry.set()

    def end_as_told(self) -> NoReturn:
        """End the main thread, which waits for no other rank; it may take its time to clean up."""
        self.told_at = 0.0
        error = ToldToStop(EXIT_CODE)
        self.publish_end(error)
        raise error

    def explain(self, error: RuntimeError) -> RunError:
        """The error to raise for a backend's: waits until heartbeats tell what has happened."""
        if not self.failure:
            self._closed_at = time.monotonic()
            self._hurry.set()
            self.failed.wait(self.patience + 2 * self.period)
        if self.failure:
            return self.failure
        peers = self._blockers(self.rank) or self.peers
        reason = str(error).partition("\n")[0]
        return PeerError(
            f"the connection to {spell_ranks(peers)} broke: {reason}",
            rank=self.rank,
            peers=tuple(peers),
            where=self._where(()),
        )

    def abandon(self, error: RunError) -> None:
        """Make the main thread raise `error` in the collective it waits in, or else in the next."""
        self.failure = self.failure or error
        self.publish_end(error)
        self.failed.set()
        for abort in self.aborts:
            abort()

    def store_ended(self) -> bool:
        """Whether the process that holds the store has closed its connection, so has ended."""
        return self.connection is not None and self.connection.ended()

    def beat(self) -> str:
        """The text that this rank publishes."""
        waits = self.waits
        self._number += 1
        return json.dumps(
            {
                "number": self._number,
                "state": self.state,
                "label": waits[0] if waits else "",
                "order": waits[1] if waits else -1,
                "doing": spell_wire(waits[2], self.names) if waits else "",
                "counts": dict(self.counts),
                "problem": self.problem,
                "help": self._help,
                "peers": self._peers,
                "circle": self._told_circle,
            }
        )

    def _publish_and_read(self) -> None:
        keys = [f"beat/{peer}" for peer in self.peers]
        while True:
            last = self._stopping.is_set()
            begin = time.monotonic()
            if self.store_ended():
                return
            try:
                self.store.set(f"beat/{self.rank}", self.beat())
                if last:
                    return
                self._read(self.store.multi_get(keys) if keys else [])
            except RuntimeError:
                return
            slept = time.monotonic() - begin
            if slept > 2 * self.period:
                self._forgive(slept)
            hurry = 20 if self._left.is_set() else 5 if self._closed_at else 1
            self._hurry.wait(self.period / hurry)
            self._hurry.clear()

    def _read(self, values: Sequence[bytes]) -> None:
        now = time.monotonic()
        for peer, value in zip(self.peers, values, strict=True):
            content = json.loads(value)
            if content["number"] != self.beats[peer].number:
                self.beats[peer] = Beat(**content, changed=now)
        self._answered = now

    def _forgive(self, gap: float) -> None:
        """Do not count a time in which this process itself stood still as the others' silence."""
        for beat in self.beats.values():
            beat.changed += gap

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._left.wait(self.period / 4):
            now = time.monotonic()
            if now - last > 2 * self.period:
                self._forgive(now - last)
                self._answered += now - last
            last = now
            if not self.told_at and self.signals():
                self.told_to_stop()
            if 0 < self.told_at < now - self.patience - 2 * self.period:
                self._end_unreachable()
            if self.waits is None and not self._closed_at:
                continue
            error = self.failure or self.examine(now)
            if error is not None:
                self._end(error)
                return

    def _end(self, error: RunError) -> None:
        """Make the main thread raise `error`; if it cannot be reached, end the process."""
        waits = self.waits
        self.failure = error
        self.state, self.problem = "lost", error.problem
        self._help, self._peers = error.help, list(error.peers)
        if isinstance(error, DeadlockError):
            self._told_circle = list(error.where)
        self._hurry.set()
        self.failed.set()
        for abort in self.aborts:
            abort()
        if waits is None:
            return
        self._left.wait(2 * self.period)
        if self.waits is waits and not self._left.is_set():
            self._exit(error)

    def _end_unreachable(self) -> None:
        """End a rank that was told to stop if neither its wait has ended nor a reason was found."""
        error = self._error("it was told to stop (SIGTERM)", self._blockers(self.rank))
        self.publish_end(ToldToStop(EXIT_CODE))
        if not self._left.wait(2 * self.period) and self.told_at:
            self._exit(error, EXIT_CODE)

    def _exit(self, error: RunError, code: int = 1) -> None:
        """End the process, whose main thread cannot be reached."""
        say(f"{type(error).__name__}: {error}")
        os._exit(code)

    def examine(self, now: float) -> RunError | None:
        """Why this rank waits in vain, or None; the nearest cause comes first."""
        for peer, beat in self.beats.items():
            if beat.state in _ENDS:
                return self._error(f"rank {peer} {beat.problem}", [peer], _ENDS[beat.state])
        ended = self.store_ended()
        if ended or now - self._answered > self.patience:
            return self._relayed() or self._storeless(ended)
        blockers = self._blockers(self.rank)
        return self._silent() or self._finished(blockers) or self._in_circle() or self._relayed()

    def _storeless(self, ended: bool) -> RunError:
        """The error for a store that does not answer, or that has ended with its process."""
        what = "has ended" if ended else "does not answer"
        if self.host is None:
            return self._error(f"the launcher, which keeps the store of the run, {what}", [])
        if ended:
            what = "died" if self.beats[self.host].state == "running" else "has finished"
        help = _READ_OUTPUT if ended else _LOOK_AT_PROCESS
        return self._error(
            f"rank {self.host}, which keeps the store of the run, {what}", [self.host], help
        )

    def _silent(self) -> RunError | None:
        closed = self._closed_at
        limit = 2.5 * self.period if closed else self.patience
        silent = [
            peer
            for peer, beat in self.beats.items()
            if beat.state == "running" and self._answered - beat.changed > limit
        ]
        if not silent:
            return None
        group = self.members[self.waits[0]](self.rank) if self.waits else ()
        if closed and not set(group).isdisjoint(silent):
            return self._error(f"{spell_ranks(silent)} died", silent, _READ_OUTPUT)
        what = verb(silent, "does not answer", "do not answer")
        return self._error(f"{what}: no heartbeat for {limit:.0f} s", silent, _LOOK_AT_PROCESS)

    def _finished(self, blockers: Sequence[int]) -> RunError | None:
        done = [peer for peer in blockers if self._beat(peer).state == "finished"]
        if not done:
            return None
        what = verb(done, "has finished", "have finished")
        return self._error(f"{what} while rank {self.rank} waits", done, _RUN_SAME_STEPS)

    def _relayed(self) -> RunError | None:
        for peer, beat in self.beats.items():
            if beat.circle:
                return self._deadlock(beat.circle)
            if beat.state == "lost":
                where = [*self._where([]), f"rank {peer} says so, and has stopped"]
                peers = tuple(beat.peers) or (peer,)
                return PeerError(
                    beat.problem, rank=self.rank, peers=peers, where=where, help=beat.help
                )
        return None

    def _in_circle(self) -> RunError | None:
        """The deadlock of this rank if all that it waits for, directly or not, wait as well."""
        reached: dict[int, tuple[str, int]] = {}
        stack = [self.rank]
        while stack:
            rank = stack.pop()
            beat = self._beat(rank)
            blockers = self._blockers(rank)
            if not beat.waits or not blockers:
                return None
            reached[rank] = (beat.label, beat.order)
            stack += [peer for peer in blockers if peer not in reached]
        seen, times = self._circle
        self._circle = (reached, times + 1 if seen == reached else 1)
        if self._circle[1] * self.period / 4 < 3 * self.period:
            return None
        return self._deadlock(
            [f"rank {rank} waits in {self._beat(rank).doing}" for rank in sorted(reached)]
        )

    def _deadlock(self, where: Sequence[str]) -> RunError:
        return DeadlockError(
            "no rank can go on: each waits for another",
            rank=self.rank,
            peers=self.peers,
            where=where,
            help=CALL_SAME_METHODS,
        )

    def _beat(self, rank: int) -> Beat:
        waits = self.waits
        if rank != self.rank:
            return self.beats.get(rank, Beat())
        if waits is None:
            return Beat()
        doing = spell_wire(waits[2], self.names)
        return Beat(label=waits[0], order=waits[1], doing=doing, counts=self.counts)

    def _blockers(self, rank: int) -> list[int]:
        """The members of the group that `rank` waits in that have not reached its collective."""
        beat = self._beat(rank)
        if not beat.waits or beat.label not in self.members:
            return []
        return [
            member
            for member in self.members[beat.label](rank)
            if member != rank and self._beat(member).counts.get(beat.label, 0) <= beat.order
        ]

    def _error(self, problem: str, peers: Sequence[int], help: str = "") -> PeerError:
        where = self._where(peers)
        return PeerError(problem, rank=self.rank, peers=tuple(peers), where=where, help=help)

    def _where(self, peers: Sequence[int]) -> list[str]:
        lines = []
        if self.waits is not None:
            lines.append(f"rank {self.rank} waits in {spell_wire(self.waits[2], self.names)}")
        for peer in peers:
            beat = self._beat(peer)
            place = f"in {beat.doing}" if beat.waits else "outside collectives"
            lines.append(f"rank {peer} was last seen {place}")
        return lines

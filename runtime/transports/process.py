"""The process mesh: this process is one rank, and runs one generator against its peers.

Nothing here pickles: tensors travel as bytes over Gloo or NCCL, everything else as short texts in
the store that the ranks meet at.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.rows import Rows
from meshwright.compiler.layout.wires import WIRES, Start, Wire, receive
from meshwright.runtime.errors import OperatorError, RunError, last_words
from meshwright.runtime.rank import RankProgram
from meshwright.runtime.transports.gloo import GlooGroup
from meshwright.runtime.transports.nccl import NcclGroup
from meshwright.runtime.transports.shared import SharedGroup, host_name, share
from meshwright.runtime.transports.staged import StagedGroup, asked_for
from meshwright.runtime.world import launcher
from meshwright.runtime.world.connections import connections
from meshwright.runtime.world.digest import check_digests, check_world
from meshwright.runtime.world.rendezvous import Limit, connect, host_rank, meet, place
from meshwright.runtime.world.termination import Termination
from meshwright.runtime.world.watch import Waits, Watch

_COLLECTIVE_SECONDS = 30 * 24 * 3600.0
"""The watch ends runs: a limit on collectives would limit what their slowest member computes."""
_BACKEND_WORDS = ("gloo", "nccl", "connection", "timed out", "socket")

_Group = GlooGroup | SharedGroup | StagedGroup | NcclGroup


@dataclass(eq=False, slots=True)
class _Lane:
    """What the members of one group start in one order: the group (none if this rank is alone), and
    the number of collectives that this rank has begun."""

    group: _Group | None
    label: str
    order: int = 0


@dataclass(eq=False, slots=True)
class Handle:
    """A started collective; keeps what it was lent until it is waited for."""

    waits: Waits
    works: list[Any]
    finish: Callable[[], Tensor]


class _Waiting:
    """A context in which this rank waits for others, as `watch.waits` says until it ends.

    An error of the backend becomes the error that the watch finds; any other ends this rank.
    """

    def __init__(self, transport: ProcessMesh) -> None:
        self.transport, self.watch = transport, transport.watch

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        if error is None:
            self.watch.waits = None
            if self.watch.told_at:
                self.watch.end_as_told()
        elif not isinstance(error, RuntimeError):
            self.transport.end(error)
        elif (ours := self.transport.ours(error)) is not error:
            raise ours from None


class ProcessMesh:
    """This rank's end of a mesh of processes.

    Reads torchrun's environment variables (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`), or
    joins the default process group where the caller made one. Made by every rank in the same order.
    Groups are made on first use, in which their members wait for one another; `connect` makes those
    of transfers beforehand.

    Ranks give a heartbeat every `period` seconds; one that this rank waits for counts as stalled
    after `patience` seconds without. Raises `RunError` where the world's size is not the mesh's;
    a collective raises `PeerError` or `DeadlockError` once it can no longer complete.

    Small tensors of ranks on one host go through memory that they share. Where `shared_memory` is
    false on any member of a group, all of its tensors go over Gloo; by default it is true unless
    the environment has `MESHWRIGHT_SHARED_MEMORY=0`.

    With `through_host`, the same on every rank, the device's tensors go through host memory, and
    ranks may share a device; by default it is what `MESHWRIGHT_THROUGH_HOST=1` in the environment
    says.
    """

    has_every_rank = False
    _made = 0

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device | str = "cpu",
        *,
        period: float = 1.0,
        patience: float = 5.0,
        shared_memory: bool | None = None,
        through_host: bool | None = None,
    ) -> None:
        self.mesh, self.device = mesh, torch.device(device)
        self.through_host = asked_for() if through_host is None else through_host
        if self.device.type == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(self._place_here(int(os.environ["LOCAL_RANK"])))
        if shared_memory is None:
            shared_memory = os.environ.get("MESHWRIGHT_SHARED_MEMORY") != "0"
        self.shared_memory = shared_memory
        launcher.guard()
        limit = Limit()
        self.rank, num_processes = place()
        self.ranks: tuple[int, ...] = (self.rank,)
        check_world(mesh, num_processes)
        self.store = PrefixStore(f"meshwright/{ProcessMesh._made}", connect(limit))
        ProcessMesh._made += 1
        self.lanes: dict[tuple[object, ...], _Lane] = {}
        self.watch = self._start_watch(period, patience, limit)
        self._waiting = _Waiting(self)
        hosts = self.store.multi_get([f"host/{rank}" for rank in range(mesh.num_ranks)])
        self._ranks_here = hosts.count(hosts[self.rank])
        self._detach = launcher.at_end(self.watch.abandon)
        self.termination = Termination(self.watch)
        self._closed = False
        self._ended: RunError | None = None
        """The error of whatever is called next: a collective or a method was left half done."""
        atexit.register(self.close)

    def _place_here(self, place: int) -> int:
        """The device of this host's process number `place`."""
        return place % torch.cuda.device_count() if self.through_host else place

    def _start_watch(self, period: float, patience: float, limit: Limit) -> Watch:
        num_ranks = self.mesh.num_ranks
        peers = [rank for rank in range(num_ranks) if rank != self.rank]
        if num_ranks > 64:
            # The store serves one request per rank and period: from here on, watch neighbours only.
            near = {r for axis in self.mesh.names for r in self.mesh.group(self.rank, (axis,))}
            peers = sorted(near - {self.rank})
        before = set(connections())
        own: Any = self.store.clone()  # type: ignore[attr-defined]  # missing in torch's stub
        opened = [found for found in connections() if found not in before]
        own.set_timeout(timedelta(seconds=patience))
        watch = Watch(
            own,
            self.rank,
            peers,
            host_rank(),
            opened[0] if len(opened) == 1 else None,
            period=period,
            patience=patience,
        )
        texts = {"host": host_name(), "beat": watch.beat()}
        meet(self.store, self.rank, num_ranks, limit, texts)
        watch.start()
        return watch

    def __repr__(self) -> str:
        return f"<ProcessMesh: this process is rank {self.rank}>"

    def run(self, programs: Sequence[RankProgram], names: Sequence[str] = ()) -> list[Any]:
        """Drive this rank's generator, the only one, to its end; returns what it returned.

        `names[i]` is the node of the collective with index i, for errors. An exception of the
        program's own is told to the other ranks before it goes on, and ends the run: the next
        collective of this rank would meet one that the others are still in.
        """
        self._check_going()
        self.watch.names = names
        (program,) = programs
        send = program.send
        value: Any = None
        try:
            while True:
                request, value = send(value), None
                kind = type(request)
                if kind is tuple:
                    value = self.collective(*request)
                elif kind is Start:
                    value = self.start(request.wire, request.tensor, request.donate)
                else:
                    value = self.wait(request.handle)
                del request
        except StopIteration as stop:
            return [stop.value]
        except RunError as error:
            if isinstance(error, OperatorError):
                self.end(error)
            raise
        except BaseException as error:
            self.end(error)
            raise
        finally:
            # It is cleaned up now, and not when somebody drops the exception.
            program.close()

    def _check_going(self) -> None:
        if self._ended is not None:
            raise self._ended

    def end(self, error: BaseException) -> None:
        """Tell the others what ends this rank, and refuse whatever is called afterwards."""
        self.watch.waits = None
        self.watch.publish_end(error)
        self._ended = self._ended or RunError(
            f"rank {self.rank} cannot go on: `{type(error).__name__}` left a call half done",
            rank=self.rank,
            help="start all ranks again, and load the last checkpoint",
        )

    def collective(self, wire: Wire, tensor: Tensor, donate: bool = False) -> Tensor:
        """This rank's result; with `donate` its operand may be overwritten and returned."""
        lane = self.lanes.get(wire.lane) or self._lane(wire)
        group, watch = lane.group, self.watch
        if group is None or _is_empty(tensor):
            return _alone(wire, tensor, 1 if group is None else group.size)
        if watch.failure is not None:
            raise watch.failure
        order = lane.order
        lane.order = watch.counts[lane.label] = order + 1
        watch.waits = (lane.label, order, wire)
        with self._waiting:
            works, finish = group.begin(wire, tensor, False, donate)
            for work in works:
                work.wait()
            return finish()

    def start(self, wire: Wire, tensor: Tensor, donate: bool = False) -> Handle:
        """Begin a collective; until its wait the operand must stay as it is."""
        lane = self.lanes.get(wire.lane) or self._lane(wire)
        group, watch = lane.group, self.watch
        if group is None or _is_empty(tensor):
            result = _alone(wire, tensor, 1 if group is None else group.size)
            return Handle((lane.label, -1, wire), [], lambda: result)
        if watch.failure is not None:
            raise watch.failure
        order = lane.order
        lane.order = watch.counts[lane.label] = order + 1
        waits = watch.waits = (lane.label, order, wire)
        with self._waiting:
            works, finish = group.begin(wire, tensor, True, donate)
        return Handle(waits, works, finish)

    def wait(self, handle: Handle) -> Tensor:
        """The result of a started collective; each handle is waited for once."""
        self.watch.waits = handle.waits
        with self._waiting:
            for work in handle.works:
                work.wait()
            result = handle.finish()
        handle.works, handle.finish = [], _taken
        return result

    def check_same_program(self, digest: str) -> None:
        """Compare a SHA-256 in hexadecimal over all ranks; raises `MismatchError` on every one."""
        self._check_going()
        own = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8).to(self.device)
        every = self.collective(Wire("all_gather", self.mesh.names), own)
        check_digests([bytes(row).hex() for row in every.tolist()], self.rank)

    def close(self, error: BaseException | None = None) -> None:
        """Leave the mesh: say how this rank ended, stay while others need it, free the groups.

        Runs by itself when the interpreter exits. The others are told of `error`, if one ends it.
        """
        if self._closed:
            return
        if error is not None:
            self.watch.publish_end(error)
        self._closed = True
        atexit.unregister(self.close)
        state, problem = self._last_state()
        self.watch.leave(state, problem)
        self._detach()
        self.termination.close()
        if state != "lost":
            self.watch.linger(self.watch.patience)
        elif self.rank == self.watch.host:
            # Nobody needs it any more, but the others have to read which rank it has lost.
            self.watch.linger(3 * self.watch.period, whole=True)
        self.watch.stop()
        for lane in self.lanes.values():
            if lane.group is not None:
                lane.group.close()
        self.lanes.clear()

    def _last_state(self) -> tuple[str, str]:
        if self.watch.state != "running":
            return self.watch.state, self.watch.problem
        # Set by the interpreter when an exception has ended the script.
        error = getattr(sys, "last_value", None)
        if error is not None:
            return last_words(error)
        return "finished", ""

    def connect(self, wires: Iterable[Wire]) -> None:
        """Connect the lanes of all transfers of a program, so that no start waits for its peer.

        Every rank gives the same wires; pairs connect one after the other, in the order of labels.
        """
        lanes = {wire.label: wire for wire in wires if wire.lane not in self.lanes}
        for _, wire in sorted(lanes.items()):
            if self.rank in wire.members(self.mesh, self.rank):
                self._lane(wire)
            else:
                # Others may wait in it, for a rank that waits for this one.
                self._watch_members(wire)

    def _watch_members(self, wire: Wire) -> None:
        of_rank = partial(wire.members, self.mesh)
        self.watch.members[wire.label] = self.watch.members[f"connection {wire.label}"] = of_rank

    def _lane(self, wire: Wire) -> _Lane:
        members = wire.members(self.mesh, self.rank)
        group: _Group | None = None
        self._watch_members(wire)
        if len(members) > 1:
            group = self._watched_connection(wire, members)
            self.watch.aborts.append(group.abort)
        lane = self.lanes[wire.lane] = _Lane(group, wire.label)
        return lane

    def _watched_connection(self, wire: Wire, members: tuple[int, ...]) -> _Group:
        """Connect a group, and wait for that as for a collective: a member may be gone."""
        watch, label = self.watch, wire.label
        watch.counts[f"connection {label}"] = 1
        watch.waits = (f"connection {label}", 0, replace(wire, kind="connection"))
        try:
            store = PrefixStore(f"{label}/{members[0]}", self.store)
            group = self._connect_group(store, members)
        except RuntimeError as error:
            raise watch.explain(error) from None
        except BaseException as error:
            self.end(error)
            raise
        finally:
            watch.waits = None
        if watch.told_at:
            watch.end_as_told()
        return group

    def _connect_group(self, store: Store, members: tuple[int, ...]) -> _Group:
        if self.device.type == "cuda" and not self.through_host:
            return NcclGroup(store, members, self.rank, _COLLECTIVE_SECONDS)
        group = GlooGroup(store, members, self.rank, _COLLECTIVE_SECONDS)
        shared_store = PrefixStore("shared memory", store)
        found = share(shared_store, group, self.shared_memory, self._ranks_here)
        return StagedGroup(found, self.device) if self.through_host else found

    def ours(self, error: RuntimeError) -> RuntimeError:
        """The error to raise for one in a collective: what the watch finds for a backend's."""
        if self.watch.failure is None:
            text = str(error).lower()
            if isinstance(error, RunError) or not any(word in text for word in _BACKEND_WORDS):
                self.watch.waits = None
                if isinstance(error, RunError):
                    self._ended = error
                return error
        ours = self._ended = self.watch.explain(error)
        self.watch.waits = None
        return ours


def _alone(wire: Wire, tensor: Tensor, size: int) -> Tensor:
    """The result where nothing has to move: in a group of one, or of a tensor without elements."""
    return receive(wire, 0, [WIRES[wire.kind].given(tensor, 0)] * size)


def _is_empty(operand: Any) -> bool:
    """Whether no member has anything to send; of counted rows, others may have what one has not."""
    return not isinstance(operand, Rows) and not operand.numel()


def _taken() -> Tensor:
    raise RunError("a started collective was waited for twice")

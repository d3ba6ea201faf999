"""Compare what ranks are given: the global batch, or the rows that some of them share.

Ranks of one group that compute on different batches raise nothing: they train on garbage. So in
the first calls, and now and then in later ones, a checksum of every input goes to all ranks. In the
first call of a method they are compared before it runs; later ones are sent off when the call has
run, and compared when the next one begins, so that no call waits for its own comparison.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.compiler.layout.wires import Start, Wait, Wire
from meshwright.dsl.errors import spelled
from meshwright.runtime.errors import MismatchError, RunError, by_value, spell_ranks, verb
from meshwright.runtime.inputs import check_dense
from meshwright.runtime.rank import RankProgram, RankState
from meshwright.runtime.state.start import checksum
from meshwright.runtime.transports.meshes import Transport

INTERVAL = 100
"""Calls from one comparison to the next, once the first ones are over."""
_SAMPLED_BYTES = 1 << 20
"""Bytes that a later comparison reads of an input: a loader that differs, differs everywhere."""

_SAME_BATCH = "give every rank the same batch (seed all loaders alike)"
_OWN_ROWS = "or pass each rank its own rows of it to `step_local`"
_SAMPLER = "give the sampler `run.data_rank` and `run.data_ranks`, not rank and world size"


def read_interval(check_inputs: object) -> int:
    """The interval that `launch(check_inputs=...)` asks for; 0 is never. Raises `RunError`."""
    if check_inputs is True:
        return INTERVAL
    if not isinstance(check_inputs, int) or check_inputs < 0:
        raise RunError(
            f"`check_inputs` is {spelled(check_inputs)}",
            help="write `True`, `False`, or a number of steps from one comparison to the next",
        )
    return int(check_inputs)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A comparison under way: call `number` of `method`, with these inputs."""

    method: str
    number: int
    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    handle: object


class InputCheck:
    """Compares what ranks are given, in calls 1, 2, 4, 8 and so on up to `interval`, and then once
    in every `interval` calls.

    Made and called alike on every rank; `splits_data` is whether the plan splits the batch.
    """

    def __init__(
        self, transport: Transport, state: RankState, interval: int, *, splits_data: bool
    ) -> None:
        self.transport, self.state = transport, state
        self.interval, self.splits_data = interval, splits_data
        self._calls: Counter[str] = Counter()
        self._sent: _Sent | None = None

    def before(
        self,
        method: str,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        axes: tuple[str, ...] = (),
    ) -> None:
        """Count a call; the first is compared now. `axes` split the rows that ranks were given.

        Raises `MismatchError` for this comparison, or for one that an earlier call sent off.
        """
        self.settle()
        self._calls[method] += 1
        if self._calls[method] == 1:
            self._send(method, names, tensors, axes)
            self.settle()

    def after(
        self,
        method: str,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        axes: tuple[str, ...] = (),
    ) -> None:
        """Send a comparison off, if this call is to be compared."""
        number = self._calls[method]
        early = number < self.interval and not number & (number - 1)
        if number > 1 and (early or not number % self.interval):
            self._send(method, names, tensors, axes)

    def settle(self) -> None:
        """Compare what was sent off. Raises `MismatchError` that names ranks and inputs."""
        sent, self._sent = self._sent, None
        if sent is None:
            return
        (sums,) = self.transport.run([_waited(sent.handle)])
        rows = sums.T.tolist()
        lines: dict[str, list[str]] = {}
        culprits: set[int] = set()
        for name, row in zip(sent.names, rows, strict=True):
            for ranks in sent.groups:
                usual, *others = by_value(ranks, [row[rank] for rank in ranks])
                different = list(itertools.chain(*others))
                if different:
                    culprits.update(different)
                    line = f"{verb(different, 'differs', 'differ')} from {spell_ranks(usual)}"
                    lines.setdefault(line, []).append(f"`{name}`")
        if lines:
            raise self._mismatch(sent, lines, culprits)
        if sent.method == "step_local" and sent.number == 1:
            _warn_of_equal_rows(sent, rows)

    def _mismatch(
        self, sent: _Sent, lines: dict[str, list[str]], culprits: set[int]
    ) -> MismatchError:
        inputs = dict.fromkeys(name for names in lines.values() for name in names)
        local = sent.method == "step_local"
        what = "rows, and work on the same ones" if local else "batches"
        own_rows = sent.method == "step" and self.splits_data
        help = _SAMPLER if local else f"{_SAME_BATCH}{f', {_OWN_ROWS}' if own_rows else ''}"
        return MismatchError(
            f"ranks were given different {what}: {', '.join(inputs)}, in call {sent.number} of "
            f"`{sent.method}`",
            rank=self.state.rank,
            peers=tuple(sorted(culprits)),
            where=[f"{', '.join(names)}: {line}" for line, names in lines.items()],
            help=help,
        )

    def _send(
        self, method: str, names: Sequence[str], tensors: Sequence[Tensor], axes: tuple[str, ...]
    ) -> None:
        if not tensors:
            return
        mesh, number = self.state.mesh, self._calls[method]
        sums = torch.stack([_sum(tensor, number).to(self.state.device) for tensor in tensors])
        (handle,) = self.transport.run([_started(Wire("all_gather", mesh.names), sums)])
        groups = mesh.groups(tuple(axis for axis in mesh.names if axis not in axes))
        self._sent = _Sent(method, number, tuple(names), groups, handle)


def _started(wire: Wire, tensor: Tensor) -> RankProgram:
    handle = yield Start(wire, tensor)
    return handle


def _waited(handle: object) -> RankProgram:
    result = yield Wait(handle)
    return result


def _sum(tensor: Tensor, number: int) -> Tensor:
    """A checksum: of the whole tensor in the first call, later of elements spread over it."""
    check_dense(tensor)
    stride = -(-tensor.nbytes // _SAMPLED_BYTES)
    if number > 1 and stride > 1:
        tensor = tensor.detach().reshape(-1)[number % stride :: stride]
    return checksum(tensor)


def _warn_of_equal_rows(sent: _Sent, rows: Sequence[Sequence[Any]]) -> None:
    if len(sent.groups) > 1 and all(len(set(row)) == 1 for row in rows):
        warnings.warn(
            "every rank passed the same rows to `step_local`, which takes each rank's own: "
            "slice the batch with `run.data_slice(n)`, or give the sampler `run.data_rank` and "
            "`run.data_ranks`",
            stacklevel=5,
        )

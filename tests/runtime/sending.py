"""Count the bytes that a rank sends over its process groups."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch import Tensor

import meshwright as mw
from meshwright.runtime.transports import gloo

_PROCESS_GROUP = gloo.ProcessGroupGloo
_sent: Counter[int] = Counter()
"""Bytes that this rank sent, by the number of its process group."""


class CountedGroup:
    """A process group that counts what it sends; any other call of it fails."""

    made = 0

    def __init__(self, *args: Any) -> None:
        self.group, self.number = _PROCESS_GROUP(*args), CountedGroup.made
        CountedGroup.made += 1

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        _sent[self.number] += sum(tensor.nbytes for tensor in tensors)
        return self.group.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        return self.group.recv(tensors, peer, tag)


def sent_in_a_step(program: mw.Program, example: Any) -> dict[str, int]:
    """The bytes that this rank sends in a step, by axes."""
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHWRIGHT_SHARED_MEMORY", "0")  # what moves through it, no group sends
        patched.setattr(gloo, "ProcessGroupGloo", CountedGroup)
        with program.launch(check_inputs=False) as run:
            run.step(*args, **kwargs)
            _sent.clear()
            run.step(*args, **kwargs)
            lanes = run.transport.lanes
            numbers = {", ".join(axes): lane.group.backend.number for axes, lane in lanes.items()}
    assert set(_sent) <= set(numbers.values())
    return {axes: _sent[number] for axes, number in sorted(numbers.items()) if _sent[number]}

"""Count what a rank sends and receives over its process groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

import meshwright as mw
from meshwright.runtime.transports import gloo

_PROCESS_GROUP = gloo.ProcessGroupGloo


@dataclass
class Messages:
    """The bytes of each message of a group, in order, and the ranks in it."""

    members: tuple[int, ...] = ()
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)


class CountedGroup:
    """A process group that counts its messages; any other call of it fails."""

    made: list[Messages] = []  # noqa: RUF012

    def __init__(self, *args: Any) -> None:
        self.group, self.messages = _PROCESS_GROUP(*args), Messages()
        CountedGroup.made.append(self.messages)

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        self.messages.sent.append(sum(tensor.nbytes for tensor in tensors))
        return self.group.send(tensors, peer, tag)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        self.messages.received.append(sum(tensor.nbytes for tensor in tensors))
        return self.group.recv(tensors, peer, tag)


def moved_in_a_step(program: mw.Program, example: Any) -> dict[str, Messages]:
    """What this rank sends and receives in a step, by the label of the wires that carry it."""
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHWRIGHT_SHARED_MEMORY", "0")  # what moves through it, no group sends
        patched.setattr(gloo, "ProcessGroupGloo", CountedGroup)
        with program.launch(check_inputs=False) as run:
            run.step(*args, **kwargs)
            for each in CountedGroup.made:
                each.sent.clear()
                each.received.clear()
            run.step(*args, **kwargs)
            found = {}
            for lane in filter(lambda lane: lane.group, run.transport.lanes.values()):
                found[lane.label] = lane.group.backend.messages
                found[lane.label].members = lane.group.members
    known = [id(each) for each in found.values()]
    assert all(id(each) in known for each in CountedGroup.made if each.sent or each.received)
    CountedGroup.made.clear()
    return found


def sent_by_axes(moved: Mapping[str, Messages]) -> dict[str, int]:
    """The bytes that this rank sent, by axes."""
    sent: Counter[str] = Counter()
    for label, each in moved.items():
        sent[label.partition(" ")[0].replace(",", ", ")] += sum(each.sent)
    return {axes: size for axes, size in sorted(sent.items()) if size}


def sent_in_a_step(program: mw.Program, example: Any) -> dict[str, int]:
    """The bytes that this rank sends in a step, by axes."""
    return sent_by_axes(moved_in_a_step(program, example))

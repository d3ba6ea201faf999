"""Runs on CUDA tensors without data: what a GPU would be asked to do, on a machine without one.

Torch's fake tensors have devices, and refuse operators whose operands are on different ones, and
reads of values, for which a host waits. A build without CUDA cannot index them or copy them by
their methods; here those call the operators themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class _Fakes(FakeTensorMode):
    avoid_device_init = True
    """Whether tensors are without data from their beginning: the device is not really there."""


def _indexed(x: Tensor, index: Any) -> Tensor:
    places = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [each for each in places if not isinstance(each, Tensor)]:
        at = next(i for i, each in enumerate(places) if each is Ellipsis)
        used = sum(each is not None for each in places) - 1
        places[at : at + 1] = [slice(None)] * (x.dim() - used)
    dim, tensors = 0, list[Tensor | None]()
    for each in places:
        if each is None:
            x = aten.unsqueeze(x, dim)
        elif isinstance(each, int):
            x = aten.select(x, dim, each)
            continue
        elif isinstance(each, slice):
            x = aten.slice(x, dim, each.start, each.stop, each.step or 1)
        tensors.append(each if isinstance(each, Tensor) else None)
        dim += 1
    return aten.index(x, tensors) if any(each is not None for each in tensors) else x


def _write(x: Tensor, index: Any, value: Any) -> None:
    part = _indexed(x, index)
    aten.copy_(part, value) if isinstance(value, Tensor) else part.fill_(value)


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype, _, _ = torch._C._nn._parse_to(
        *args, **{k: v for k, v in kwargs.items() if k != "copy"}
    )
    same = device in (None, x.device) and dtype in (None, x.dtype)
    if same and not kwargs.get("copy"):
        return x
    return aten._to_copy(x, device=device or x.device, dtype=dtype or x.dtype)


_METHODS = {
    "copy_": lambda *args, **kwargs: aten.copy_(*args, **kwargs),
    "__getitem__": _indexed,
    "__setitem__": _write,
    "to": _to,
}


@dataclass
class Machine(TorchDispatchMode):
    """Has a host whose tensors are real and a device whose tensors have no data.

    Counts what is asked of the device: `operators`, and `copies` to it and from it. Streams and
    events do nothing; that the host waits for one is counted.
    """

    operators: int = 0
    copies: list[str] = field(default_factory=list)
    waits: int = 0
    """How often the host waited for the device; a read of a value is an error instead."""

    def __post_init__(self) -> None:
        super().__init__()

    def current_stream(self, device: object = None) -> Any:
        return _Queue(self, torch.device("cuda", 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, (Tensor, torch.device))]
        if not any(isinstance(x, FakeTensor) or _on_device(x) for x in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self.operators += 1
        if func in (aten.copy_.default, aten._to_copy.default):
            source = args[1 if func is aten.copy_.default else 0]
            if _on_device(source) != _on_device(result):
                self.copies.append("to the device" if _on_device(result) else "to the host")
        return result


@dataclass
class _Queue:
    """A stream or an event."""

    machine: Machine
    device: torch.device

    def synchronize(self) -> None:
        self.machine.waits += 1

    def record_event(self) -> _Queue:
        return self

    def wait_event(self, event: _Queue) -> None:
        """The device waits, and not the host."""

    wait_stream = wait_event


def _on_device(x: Tensor | torch.device) -> bool:
    return (x.device if isinstance(x, Tensor) else x).type == "cuda"


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """While this is open, a device is there, whose tensors have no data."""
    fakes = _Fakes(allow_non_fake_inputs=True)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "device_count", lambda: 1)
        patched.setattr(torch.cuda, "current_device", lambda: 0)
        machine = Machine()
        patched.setattr(torch.cuda, "current_stream", machine.current_stream)
        patched.setattr(torch.cuda, "Stream", machine.current_stream)
        patched.setattr(torch.cuda, "stream", nullcontext)
        for name, method in _METHODS.items():
            patched.setattr(Tensor, name, method, raising=False)
        with fakes, machine:
            yield machine

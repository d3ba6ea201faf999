"""Capture leaves everything as it was that a forward can change in Python."""

from __future__ import annotations

import collections
import copy
import functools
import io
import linecache
import random
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.compiler.capture.capture import capture

CALLS: ContextVar[int] = ContextVar("CALLS", default=0)
TABLE: dict[str, Tensor] = {}
COUNT = 0


@functools.lru_cache
def positions(size: int) -> Tensor:
    return torch.arange(float(size))


class Busy(nn.Module):
    """Changes whatever a forward can reach."""

    made = 0
    seen: tuple[Tensor, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop = nn.Linear(4, 4), nn.Dropout(0.0)
        self.settings = Settings()
        self.log: list[Tensor] = []
        self.cache: dict[str, Any] = {"inner": {"list": [1]}}
        self.recent: collections.deque[Tensor] = collections.deque(maxlen=3)
        self.stubborn = Stubborn([1])
        self.ordered = collections.OrderedDict(x=1, y=2)

    def forward(self, x: Tensor, memo: dict[str, Tensor] = {}) -> Tensor:  # noqa: B006
        global COUNT
        COUNT += 1
        CALLS.set(CALLS.get() + 1)
        TABLE["x"] = memo["x"] = self.cache["x"] = self.settings.x = x
        Busy.made += 1
        Busy.seen = (*Busy.seen, x)
        self.cache["inner"]["list"].append(x)
        self.settings.items.add(random.random())
        self.log.append(x)
        self.stubborn.append(2)
        self.recent.append(x)
        self.ordered.move_to_end("x")
        self.drop.eval()
        self.drop.p = 0.5
        torch.rand(1)
        self.a.register_forward_hook(lambda module, args, output: TABLE.update(output=output))
        inner, self.a.forward = self.a.forward, lambda x: inner(x) * 1  # type: ignore[method-assign]
        return (self.a(x) * positions(4)).sum()


class Stubborn(list[int]):
    def clear(self) -> None:
        raise TypeError("not to be cleared")


class Settings:
    def __init__(self) -> None:
        self.items: set[float] = set()


def test_a_forward_that_changes_everything_leaves_nothing_behind() -> None:
    model, x = Busy(), torch.randn(2, 4)
    eager = copy.deepcopy(model)
    drawn = random.getstate(), torch.get_rng_state()
    for _ in range(2):
        capture(model, (x,))
    assert (COUNT, CALLS.get(), TABLE, Busy.made, Busy.seen) == (0, 0, {}, 0, ())
    assert (model.log, model.cache, list(model.recent)) == ([], {"inner": {"list": [1]}}, [])
    assert vars(model.settings) == {"items": set()}
    assert len(model.stubborn) == 1
    assert list(model.ordered) == ["x", "y"]
    assert Busy.forward.__defaults__ == ({},)
    assert (model.drop.training, model.drop.p, dict(model.a._forward_hooks)) == (True, 0.0, {})
    assert "forward" not in vars(model.a)
    assert random.getstate() == drawn[0]
    assert torch.get_rng_state().equal(drawn[1])
    torch.testing.assert_close(model(x), eager(x))


def test_tensors_are_to_python_what_they_were() -> None:
    def seen() -> list[Any]:
        zero, row = torch.tensor(3), torch.tensor([1, 2])
        return [
            torch.tensor([zero, zero]).tolist(), torch.as_tensor([[zero], [zero]]).tolist(),
            torch.stack(list(row)).tolist(), [*range(5)][zero], bool(zero), float(zero), int(zero),
            f"{zero} {row}", 2 in row, len(row), row[row.bool()].tolist(), row.equal(row),
        ]  # fmt: skip

    before = seen()
    capture(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), (torch.randn(4, 3),), mode="infer")
    assert seen() == before


class Full(io.StringIO):
    """A stream on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stderr", [None, Full()])
def test_a_process_that_cannot_print_errors_compiles(
    stderr: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", stderr)
    assert capture(nn.Linear(4, 4), (torch.randn(2, 4),), loss=torch.sum)


def test_source_files_that_are_read_for_stacks_are_not_kept() -> None:
    cell = "<a cell>"
    linecache.clearcache()
    linecache.getline(__file__, 1)

    class Reads(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            linecache.cache[cell] = (4, None, ["text"], cell)
            return super().forward(x)

    try:
        capture(Reads(4, 4), (torch.ones(2, 4),), mode="infer")
        assert {__file__, cell} <= linecache.cache.keys()
        assert torch.nn.modules.module.__file__ not in linecache.cache
    finally:
        linecache.cache.pop(cell, None)

"""Layers beside linears train split as they do whole: convolutions, scans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.equivalence import check_equal, implicit_gathers
from tests.models import real


class Convolved(nn.Module):
    """A convolution over what is left of `[b, 16, 16]`, between two linears over channels."""

    def __init__(self, conv: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.up, self.conv, self.shape = nn.Linear(8, 16), conv, shape
        self.down = nn.Linear(conv.out_channels, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).transpose(1, 2).unflatten(2, self.shape)
        h = self.conv(h).flatten(2).transpose(1, 2)
        return self.down(F.silu(h)).square().mean()


def sequences() -> tuple[Tensor]:
    return (real(4, 16, 8),)


DATA = "mesh dp=2, tp=2\ndata x over dp\n"
COLUMNS, ROWS = "columns up over tp\n", "rows down over tp\n"
GROUPS = COLUMNS + ROWS + "shard conv.weight [c@tp, ...]\n"
BIASED = GROUPS + "shard conv.bias [c@tp]\n"

SPLIT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "depthwise": (lambda: nn.Conv1d(16, 16, 3, padding=1, groups=16), (16,), BIASED),
    "dilated": (lambda: nn.Conv1d(16, 16, 3, dilation=2, groups=16, bias=False), (16,), GROUPS),
    "depthwise of images": (
        lambda: nn.Conv2d(16, 16, 3, padding="same", groups=16), (4, 4), BIASED
    ),
    "depthwise of volumes": (lambda: nn.Conv3d(16, 16, 2, padding=1, groups=16), (2, 2, 4), BIASED),
    "several outputs a channel": (lambda: nn.Conv1d(16, 32, 3, groups=16), (16,), BIASED),
    "groups": (lambda: nn.Conv2d(16, 24, 2, stride=2, groups=4), (4, 4), BIASED),
    "transposed depthwise": (
        lambda: nn.ConvTranspose1d(16, 16, 3, stride=2, groups=16), (16,), BIASED
    ),
    "transposed groups": (
        lambda: nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1, groups=4), (4, 4), BIASED
    ),
    "rows": (lambda: nn.Conv2d(16, 12, 3, padding="same"), (4, 4), COLUMNS + "rows conv over tp\n"),
    "columns": (lambda: nn.Conv1d(16, 12, 3), (16,), "columns conv over tp\n" + ROWS),
    "transposed rows": (
        lambda: nn.ConvTranspose2d(16, 12, 3, stride=2), (4, 4), COLUMNS + "rows conv over tp\n"
    ),
    "transposed columns": (
        lambda: nn.ConvTranspose1d(16, 12, 3, bias=False), (16,), "columns conv over tp\n" + ROWS
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLIT)
def test_a_convolution_with_split_channels_sends_only_its_sums(name: str) -> None:
    conv, shape, plan = SPLIT[name]
    program = check_equal(Convolved(conv(), shape), sequences, DATA + plan, steps=2)
    assert implicit_gathers(program) == []
    assert {each.kind for each in program.comm()} == {"all_reduce"}


class Scan(nn.Module):
    """A recurrence over time whose inputs are shared by all channels, as Mamba's are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.shared, self.down = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        mixed, state, out = self.shared(h), h[:, 0, :, None], []
        for t in range(x.shape[1]):
            state = state.tanh() * mixed[:, t, None] + h[:, t, :, None]
            out.append(state.sum(2))
        return self.down(torch.stack(out, 1)).square().mean()


def test_time_steps_of_what_channels_share_are_reduced_together() -> None:
    plan = COLUMNS + "rows shared, down over tp\n"
    program = check_equal(Scan(), sequences, "mesh tp=2\n" + plan, steps=2)
    assert implicit_gathers(program) == []
    # Two sums forward, that of `shared` backward and the whole biases' gradients.
    assert program.comm().counts()["all_reduce[tp]"] <= 4

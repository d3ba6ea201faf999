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


class Rotated(nn.Module):
    """Attention whose rotary embedding multiplies by complex numbers, learned or not."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 48), nn.Linear(16, 8)
        self.speed = nn.Parameter(torch.rand(2), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).unbind(2)
        angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), self.speed)
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k = (
            torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (2, 2))) * turns).flatten(3)
            for h in (q, k)
        )
        y = F.scaled_dot_product_attention(*(h.transpose(1, 2) for h in (q, k, v)))
        return self.o(y.transpose(1, 2).flatten(2)).square().mean()


@pytest.mark.parametrize("learned", [False, True])
def test_complex_rotations_keep_batch_and_heads_split(learned: bool) -> None:
    plan = DATA + "let heads = 4\ncolumns qkv over tp as (3 heads hd)\nrows o over tp\n"
    program = check_equal(Rotated(learned), sequences, plan, steps=2)
    assert implicit_gathers(program) == []


class Resampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(self.up(x), scale_factor=2, mode="bilinear", align_corners=False)
        h = F.interpolate(h, (5, 7), mode="bicubic", antialias=True).relu()
        return F.pixel_shuffle(self.down(F.interpolate(h, (6, 6))), 2).square().mean()


def test_images_are_resampled_with_batch_and_channels_split() -> None:
    plan = DATA + COLUMNS + ROWS
    program = check_equal(Resampled(), lambda: (real(4, 3, 4, 4),), plan, steps=2)
    assert implicit_gathers(program) == []


class Seen(nn.Module):
    """Image features take the places of a token, as in models of text and images."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.wte, self.image, self.head = nn.Embedding(20, 8), nn.Linear(6, 8), nn.Linear(8, 20)
        self.rows = rows

    def forward(self, tokens: Tensor, images: Tensor) -> Tensor:
        x, mask = self.wte(tokens), (tokens == 3)[..., None]
        mask = mask.expand_as(x) if self.rows else mask & (torch.arange(8) < 8)
        x = x.masked_scatter(mask, self.image(images))
        return self.head(x).square().mean()


@pytest.mark.parametrize("rows", [True, False])
def test_image_features_take_the_places_of_their_token(rows: bool) -> None:
    def batch() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(4, 20, (4, 6))
        for row, count in enumerate((2, 1, 0, 3)):
            tokens[row, torch.randperm(6)[:count]] = 3
        return tokens, real(6, 6)

    plan = "mesh tp=2\ncolumns image over tp\nvocab wte, head over tp\nallow replicate **\n"
    check_equal(Seen(rows), batch, plan, steps=2)


class Views(nn.Module):
    """Two views of each row, one batch after the other or row by row, against each other."""

    def __init__(self, loss: str, interleaved: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)
        self.loss, self.interleaved = loss, interleaved

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.stack([x, y], 1).flatten(0, 1) if self.interleaved else torch.cat([x, y])
        h = self.down(F.relu(self.up(both)))
        other = torch.arange(len(h)).roll(len(h) // 2)
        return LOSSES_OF_VIEWS[self.loss](h, other)


LOSSES_OF_VIEWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrastive": lambda h, other: F.cross_entropy(h @ h.T, other, label_smoothing=0.1),
    "soft": lambda h, other: F.cross_entropy(h @ h.T, (h @ h.T).detach().softmax(0)[other]),
    "lookup": lambda h, other: F.embedding(other, h).sin().mul(h).mean(),
    "graph": lambda h, other: torch.zeros_like(h).index_add(0, other, h).sin().mul(h).mean(),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("loss", LOSSES_OF_VIEWS)
def test_batches_put_together_are_counted_in_their_order(loss: str, interleaved: bool) -> None:
    torch.manual_seed(0)
    plan = "mesh dp=2, tp=2\ndata x, y over dp\ncolumns up over tp\nrows down over tp\n"
    check_equal(Views(loss, interleaved), lambda: (real(6, 8), real(6, 8)), plan)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.table(x)), y)


@pytest.mark.parametrize("rows", ["(3 v@tp)", "(v@tp | v@tp)", "(v@tp)"])
def test_a_table_may_be_split_in_any_part_of_its_rows(rows: str) -> None:
    plan = f"mesh tp=2\nshard table.weight [{rows}, d]\nshard head.weight [{rows}, d]\n"
    check_equal(
        Table(),
        lambda: (torch.randint(0, 12, (5,)), torch.randint(0, 12, (5,))),
        f"{plan}shard head.bias [{rows}]\n",
    )

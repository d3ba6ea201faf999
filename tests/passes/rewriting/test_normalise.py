"""The pass `normalise`: few operators are left, and a mean is a sum and a count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright import CaptureError
from meshwright.passes.rewriting import normalise
from tests.equivalence import check_equal, implicit_gathers
from tests.models import real
from tests.passes.examples import Lm, labelled
from tests.passes.stages import check_documented, shown, stages


def test_the_docstring_shows_a_loss_before_and_after() -> None:
    found = stages(Lm(), labelled(), "mesh dp=2\ndata tokens, targets over dp\n")
    check_documented(
        normalise,
        shown(found["captured"], "cross_entropy_loss"),
        shown(
            found["normalise"],
            *("cross_entropy", "getitem", "sum", "ne", "sum_1", "to_copy", "div"),
        ),
    )


class Any(nn.Module):
    def __init__(self, body: object) -> None:
        super().__init__()
        self.w, self.body = nn.Parameter(torch.randn(4, 6, 8)), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * self.w)  # type: ignore[operator, no-any-return]


def masked(x: Tensor, rows: Tensor) -> Tensor:
    """Attention of blocks of batches under a mask that some of them share."""
    mask = rows.unsqueeze(-2).expand(*rows.shape[:-1], 3, 3)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask).square().sum()


@pytest.mark.parametrize(
    "body",
    [
        lambda h: h.mean(),
        lambda h: h.mean((0, 2)).square().sum(),
        lambda h: h.mean(1, keepdim=True).square().sum(),
        lambda h: F.layer_norm(h, (6, 8)).square().mean(),
        lambda h: F.rms_norm(h, (8,)).abs().mean(),
        lambda h: F.pad(h, (1, 2)).square().sum(),
        lambda h: (h[:1].repeat(4, 1, 1) * h.repeat(1, 1, 1)).mean(),
        lambda h: (h.repeat(2, 2, 1, 3)[0, 1::2].square() * h[0, 0].tile(3)).mean(),
        lambda h: (h.tile(2).exp() * h.flatten().tile(2, 3, 4, 1).sum()).mean(),
        lambda h: h.flatten(1).unflatten(1, (8, 6)).exp().mean(),
        lambda h: h.to(torch.float64).contiguous().reshape(-1).sum(),
        lambda h: F.mse_loss(h, h.detach() * 2, reduction="sum"),
        lambda h: F.scaled_dot_product_attention(h, h, h).mean(),
        lambda h: F.scaled_dot_product_attention(*(h.view(2, 2, 2, 3, 8),) * 3).square().sum(),
        lambda h: masked(h.view(2, 2, 2, 3, 8), h.view(2, 2, 2, 24)[:, :1, :, :3]),
        lambda h: masked(h.view(2, 2, 2, 3, 8), h.view(2, 2, 2, 24)[0, :, :, :3]),
        lambda h: h[torch.arange(4)[:, None], torch.arange(6)].square().mean(),
        lambda h: h[torch.arange(4), torch.arange(6)[:, None]].cumsum(0).mean(),
        lambda h: (h[torch.arange(3, -1, -1)[:, None], torch.arange(6)] * h).square().mean(),
        lambda h: F.dropout(h, 0.0).sum(),
        lambda h: torch.concat((h, h * 2), dim=-1).square().mean(),
    ],
)
def test_what_replaces_an_operator_trains_as_it_does(body: object) -> None:
    torch.manual_seed(0)
    check_equal(
        Any(body), lambda: (real(4, 6, 8),), "mesh dp=2\nshard x [b@dp, s, d]\nallow replicate **\n"
    )


def test_a_lookup_of_every_element_in_order_moves_dims_only() -> None:
    def body(h: Tensor) -> Tensor:
        return h[torch.arange(4)[:, None, None], torch.arange(6)].sum()

    found = stages(Any(body), (torch.randn(4, 6, 8),), "mesh dp=2\nshard x [b@dp, s, d]\n")
    assert shown(found["normalise"], "view") == ["view: f32[4, 1, 6, 8] = view(mul, [4, 1, 6, 8])"]


def test_embeddings_that_scale_their_gradient_by_frequency_are_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(8, 4, scale_grad_by_freq=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.e(x).sum()

    example, plan = (torch.randint(0, 8, (4,)),), "mesh dp=2\n"
    with pytest.raises(CaptureError, match="the embedding `e` has `scale_grad_by_freq`"):
        stages(Scaled(), example, plan)

    class Lookup(nn.Embedding):
        def forward(self, x: Tensor) -> Tensor:
            return F.embedding(x, self.weight, scale_grad_by_freq=True).sum()

    with pytest.raises(CaptureError, match="an embedding in the model has `scale_grad_by_freq`"):
        stages(Lookup(8, 4), example, plan)


def test_a_parameter_repeated_for_each_row_of_a_split_batch_is_repeated_on_each_rank() -> None:
    class Probed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.probe, self.table = nn.Parameter(torch.randn(1, 3, 8)), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            probes = self.probe.repeat(x.shape[0], 1, 1) * x[:, None]
            return (probes * self.table.repeat(x.shape[0] // 2)[:, None, None]).exp().mean()

    program = check_equal(Probed(), (real(64, 8),), "mesh dp=2\ndata x over dp\n")
    assert implicit_gathers(program) == []

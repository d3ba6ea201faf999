"""Every decomposition beside the operator it stands for: values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.compiler.autodiff.decompositions import DECOMPOSITIONS

aten: Any = torch.ops.aten
_RANDOM = torch.Generator().manual_seed(0)


def f(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_RANDOM, dtype=torch.float64)


def p(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_RANDOM, dtype=torch.float64) * 0.8 + 0.1


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


INFINITE = t(-math.inf, -math.inf, 1, -math.inf, 1, math.inf).view(3, 2)
"""Rows of which a maximum is infinite, or nothing but infinite."""
LABELS = torch.tensor([0, 2, -100, 1])
CELL = (f(4, 3), f(4, 5), f(5, 3), f(5, 5), f(5), f(5))
GATES = f(4, 3), f(4, 5), f(15, 3), f(15, 5), f(15), f(15)

CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (
        aten._native_batch_norm_legit_functional.default,
        (f(4, 3, 5), f(3), f(3), f(3), p(3), True, 0.1, 1e-5),
        {},
    ),
    (
        aten._native_batch_norm_legit_functional.default,
        (f(4, 3), None, None, f(3), p(3), True, 0.3, 1e-5),
        {},
    ),
    (aten.group_norm.default, (f(2, 6, 5), 3, f(6), f(6)), {}),
    (aten.group_norm.default, (f(2, 4, 3, 3), 2, None, None, 1e-4), {}),
    (aten._log_softmax.default, (f(4, 5) * 100, 1, False), {}),
    (aten._softmax.default, (f(4, 5) * 100, 0, False), {}),
    (aten.log_softmax.int, (f(4, 5), -1), {}),
    (aten.softmax.int, (f(4, 5), -1, torch.float32), {}),
    (aten.logsumexp.default, (f(4, 5) * 100, [1]), {}),
    (aten.logsumexp.default, (f(4, 5), [0, 1], True), {}),
    (aten.logsumexp.default, (INFINITE, [1]), {}),
    (aten.var.correction, (f(4, 5), [1]), {"keepdim": True}),
    (aten.var.correction, (f(4, 5), None), {"correction": 0}),
    (aten.std.correction, (f(4, 5), [0]), {}),
    (aten.var.dim, (f(4, 5), [0]), {}),
    (aten.std.dim, (f(4, 5), [0, 1], False, True), {}),
    (aten.var.default, (f(4, 5),), {}),
    (aten.std.default, (f(4, 5), False), {}),
    *((op, (t(3, 3, 1, 2).view(2, 2), [1]), {}) for op in (aten.std.correction, aten.std.dim)),
    (aten.std.default, (t(3, 3, 3),), {}),
    (aten.var.correction, (torch.complex(f(4, 5), f(4, 5)), [1]), {}),
    *((aten.l1_loss.default, (f(4, 5), f(4, 5), how), {}) for how in (0, 1, 2)),
    (aten.smooth_l1_loss.default, (f(4, 5), f(4, 5), 1, 0.5), {}),
    (aten.huber_loss.default, (f(4, 5), f(4, 5), 2, 0.5), {}),
    (aten.kl_div.default, (f(4, 5), p(4, 5)), {}),
    (aten.kl_div.default, (f(4, 5), f(4, 5), 2), {"log_target": True}),
    (aten.binary_cross_entropy.default, (p(4, 5), p(4, 5), p(4, 5)), {}),
    (aten.binary_cross_entropy_with_logits.default, (f(4, 5), p(4, 5)), {}),
    (aten.binary_cross_entropy_with_logits.default, (t(-50, -25, 25, 800), t(0, 0, 1, 0)), {}),
    (aten.binary_cross_entropy_with_logits.default, (f(4, 5), p(4, 5), p(5), p(5), 2), {}),
    (aten.nll_loss_nd.default, (f(4, 3), LABELS), {}),
    (aten.nll_loss_nd.default, (f(4, 3), LABELS.clamp(min=0), p(3), 1, 1), {}),
    (aten.nll_loss_nd.default, (f(4, 3, 2), LABELS[:, None].repeat(1, 2), p(3), 0), {}),
    (aten.nll_loss.default, (f(4, 3), LABELS, None, 2), {}),
    (aten.nll_loss.default, (INFINITE, torch.tensor([-100, 0, 0])), {}),
    (aten.nll_loss.default, (f(2, 3), torch.tensor([-100, -100])), {}),
    (aten.rnn_tanh_cell.default, CELL, {}),
    (aten.rnn_relu_cell.default, CELL[:4], {}),
    (aten.gru_cell.default, GATES, {}),
    (
        aten.lstm_cell.default,
        (f(4, 3), [f(4, 5), f(4, 5)], f(20, 3), f(20, 5), f(20), f(20)),
        {},
    ),
]

CONSTANT = {
    aten._native_batch_norm_legit_functional.default: (3, 4),
    aten.binary_cross_entropy.default: (2,),
    aten.binary_cross_entropy_with_logits.default: (2, 3),
    aten.nll_loss_nd.default: (2,),
}
"""Arguments that torch does not differentiate."""


def test_every_decomposition_is_tried() -> None:
    assert {op for op, _, _ in CALLS} == set(DECOMPOSITIONS)


@pytest.mark.parametrize(
    ("op", "args", "kwargs"), CALLS, ids=[f"{op}-{i}" for i, (op, _, _) in enumerate(CALLS)]
)
def test_a_decomposition_gives_what_the_operator_does(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    constant = CONSTANT.get(op, ())
    ours = run(DECOMPOSITIONS[op], args, kwargs, constant)
    theirs = run(op, args, kwargs, constant)
    single = theirs[0].dtype == torch.float32
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if single else {"rtol": 1e-8, "atol": 1e-13}
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, equal_nan=True, **tolerance)


def test_a_probability_of_0_or_1_has_the_slope_that_torch_gives_it() -> None:
    op = aten.binary_cross_entropy.default
    args = t(0, 0, 1, 1, 0.5), t(0, 1, 0, 1, 0.5)
    ours, theirs = (run(each, args, {}, (1,)) for each in (DECOMPOSITIONS[op], op))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)
    half = [each.half() for each in args]
    torch.testing.assert_close(DECOMPOSITIONS[op](*half), op(*half))


def run(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], constant: tuple[int, ...]
) -> list[Tensor]:
    """The results, and what autograd makes of a weighted sum of the first."""
    leaves: list[Tensor] = []

    def leaf(arg: Any) -> Any:
        if isinstance(arg, list) and isinstance(arg[0], Tensor):
            return [leaf(item) for item in arg]
        if not isinstance(arg, Tensor) or not (arg.is_floating_point() or arg.is_complex()):
            return arg
        leaves.append(arg.detach().clone().requires_grad_())
        return leaves[-1]

    given = [arg if i in constant else leaf(arg) for i, arg in enumerate(args)]
    found = function(*given, **kwargs)
    results = list(found) if isinstance(found, (tuple, list)) else [found]
    weights = torch.linspace(-1, 2, results[0].numel(), dtype=results[0].dtype)
    total = (results[0] * weights.view(results[0].shape)).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*results, *grads]

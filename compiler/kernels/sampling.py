"""Samples of distributions with parameters of their own for each element.

An element's sample is a function of its parameters and its own hashes alone: where a try may fail,
the next one has numbers of its own. All of it is computed in float64.
"""

from __future__ import annotations

from itertools import count as numbers

import torch
from torch import Tensor

from meshwright.compiler.kernels.blocks import has_data
from meshwright.compiler.kernels.hashing import RandomIndex
from meshwright.compiler.kernels.random import random

_LANES = 4
"""The most lanes of an index that one draw uses."""
_STEPS = 64
"""More than the steps from the normal approximation to any sample."""


class _Draws:
    """Independent numbers for one tensor, the next at each call."""

    def __init__(self, like: Tensor, index: RandomIndex) -> None:
        self.like, self.index, self.lanes = like, index, numbers(0, _LANES)

    def __call__(self, kind: str) -> Tensor:
        index = self.index.lane(next(self.lanes))
        return random(self.like.shape, kind, index, torch.float64, self.like.device)


def standard_gamma(shape: Tensor, index: RandomIndex) -> Tensor:
    """Gamma samples of these shape parameters and scale 1, by Marsaglia and Tsang (2000).

    For a shape below 1, a sample of `shape + 1` times a uniform number to the power `1 / shape`.
    """
    if not has_data(shape):
        return torch.empty_like(shape)
    a, draw = shape.double(), _Draws(shape, index)
    power = torch.where(a < 1, draw("uniform").log() / a, 0.0)
    d = torch.where(a < 1, a + 1, a) - 1 / 3
    c = (9 * d).rsqrt()
    found = torch.where(a == 0, 0.0, torch.full_like(a, torch.nan))
    missing = a.isfinite() & (a > 0)
    while missing.any():
        x, u = draw("normal"), draw("uniform")
        v = (1 + c * x) ** 3
        fits = u.log() < 0.5 * x * x + d * (1 - v + v.log())
        fits &= missing & (v > 0)
        found = torch.where(fits, d * v, found)
        missing &= ~fits
    sample = (found.log() + power).exp().to(shape.dtype)
    return sample.clamp_(min=torch.finfo(shape.dtype).tiny)


def dirichlet(shape: Tensor, index: RandomIndex) -> Tensor:
    """Rows of gamma samples, over their sums."""
    samples = standard_gamma(shape, index)
    return samples.div_(samples.sum(-1, keepdim=True))


def poisson(rate: Tensor, index: RandomIndex) -> Tensor:
    """Poisson samples: the first count whose cumulative probability passes a uniform number."""
    if not has_data(rate):
        return torch.empty_like(rate)
    mean, u = rate.double(), _Draws(rate, index)("uniform")
    z = torch.special.ndtri(u)
    k = (mean + mean.sqrt() * z + (z * z - 1) / 6).floor().clamp_(min=0)
    for _ in range(_STEPS):
        low = torch.special.gammaincc(k + 1, mean) < u
        high = (k > 0) & (torch.special.gammaincc(k.clamp(min=1), mean) >= u)
        if not (low | high).any():
            break
        k = k + low.double() - high.double()
    samples: Tensor = k.to(rate.dtype)
    return samples


def binomial(count: Tensor, p: Tensor, index: RandomIndex) -> Tensor:
    """Binomial samples: a walk along the cumulative probability, or, where ten or more successes
    are expected, transformed rejection (Hörmann, 1993)."""
    if not has_data(count):
        return torch.empty_like(count)
    n, p = (
        count.double() + torch.zeros_like(p, dtype=torch.float64),
        p.double() + torch.zeros_like(count, dtype=torch.float64),
    )
    draw = _Draws(n, index)
    rare = torch.minimum(p, 1 - p)
    wide = (n * rare >= 10) & n.isfinite()
    found = torch.where(wide, _rejected(n, rare, wide, draw), _walked(n, rare, draw("uniform")))
    return torch.where(p > 0.5, n - found, found).to(count.dtype)


def _walked(n: Tensor, p: Tensor, u: Tensor) -> Tensor:
    k, odds = torch.zeros_like(n), p / (1 - p)
    mass = (n * (-p).log1p()).exp()
    total = mass.clone()
    for _ in range(2 * _STEPS):
        more = (u > total) & (k < n)
        if not more.any():
            break
        mass = mass * odds * (n - k) / (k + 1)
        k += more.double()
        total += mass
    return torch.where(n.isnan() | p.isnan(), torch.nan, k)


def _rejected(n: Tensor, p: Tensor, missing: Tensor, draw: _Draws) -> Tensor:
    deviation = (n * p * (1 - p)).sqrt()
    b = 1.15 + 2.53 * deviation
    a = -0.0873 + 0.0248 * b + 0.01 * p
    alpha, certain = (2.83 + 5.1 / b) * deviation, 0.92 - 4.2 / b
    mode, log_odds = ((n + 1) * p).floor(), (p / (1 - p)).log()
    top = (mode + 1).lgamma() + (n - mode + 1).lgamma()
    found, missing = torch.zeros_like(n), missing.clone()
    while missing.any():
        u, v = draw("uniform") - 0.5, draw("uniform")
        edge = 0.5 - u.abs()
        k = ((2 * a / edge + b) * u + n * p + 0.5).floor()
        inside = (k >= 0) & (k <= n)
        mass = top - (k + 1).lgamma() - (n - k + 1).lgamma() + (k - mode) * log_odds
        likely = (v * alpha / (a / (edge * edge) + b)).log() <= mass
        fits = missing & inside & (((edge >= 0.07) & (v <= certain)) | likely)
        found = torch.where(fits, k, found)
        missing &= ~fits
    return found

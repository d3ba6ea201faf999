"""Random numbers from hashes: their distributions, their independence, and their layouts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.special import gammainc, ndtr

from meshwright.compiler.kernels.hashing import RandomIndex
from meshwright.compiler.kernels.random import random
from meshwright.compiler.kernels.sampling import binomial, dirichlet, poisson, standard_gamma

KINDS = ("uniform", "normal", "bits")
CPU = torch.device("cpu")
COUNT = 1 << 17
F64, TYPES = torch.float64, (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _index(shape: tuple[int, ...], seed: int = 1, step: int = 2, op_id: int = 3) -> RandomIndex:
    return RandomIndex(seed, step, op_id, shape, (0,) * len(shape))


def _drawn(kind: str, dtype: torch.dtype = F64, **key: int) -> Tensor:
    numbers = random((COUNT,), kind, _index((COUNT,), **key), dtype, CPU)
    assert numbers.dtype == dtype
    return numbers


def _check_continuous(numbers: Tensor, cumulative: Callable[[Tensor], Tensor]) -> None:
    """Kolmogorov and Smirnov's test: 1.95 is passed by chance once in a thousand times."""
    expected = (torch.arange(len(numbers), dtype=F64) + 0.5) / len(numbers)
    apart = (cumulative(numbers.double().sort().values) - expected).abs().max()
    assert apart * len(numbers) ** 0.5 < 1.95


def _check_counts(numbers: Tensor, mass: Callable[[Tensor], Tensor]) -> None:
    """The chi-square statistic of the values that are expected at least 20 times."""
    found = torch.bincount(numbers.long()).double()
    expected = mass(torch.arange(len(found), dtype=F64)) * len(numbers)
    often = expected >= 20
    statistic = ((found - expected).square() / expected)[often].sum()
    freedom = float(often.sum())
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
    assert found[~often].sum() < expected[~often].sum() + 5 * expected.sum() ** 0.5


@pytest.mark.parametrize("dtype", TYPES)
def test_uniform_numbers_are_uniform_and_strictly_inside(dtype: torch.dtype) -> None:
    numbers = _drawn("uniform", dtype)
    assert numbers.min() > 0
    assert numbers.max() < 1
    if dtype.itemsize > 2:
        _check_continuous(numbers, lambda x: x)
    assert abs(numbers.double().mean() - 0.5) < 5 / (12 * COUNT) ** 0.5


@pytest.mark.parametrize("dtype", TYPES)
def test_normal_numbers_are_normal(dtype: torch.dtype) -> None:
    numbers = _drawn("normal", dtype)
    assert numbers.isfinite().all()
    if dtype.itemsize > 2:
        _check_continuous(numbers, ndtr)
    assert abs(numbers.double().mean()) < 5 / COUNT**0.5
    assert abs(numbers.double().var() - 1) < 5 * (2 / COUNT) ** 0.5


def test_whole_numbers_are_uniform_by_remainder_and_by_size() -> None:
    numbers = _drawn("bits", torch.int64)
    assert numbers.min() >= 0
    for divisor in (2, 3, 8, 10, 1000):
        _check_counts(numbers % divisor, lambda x, d=divisor: torch.full_like(x, 1 / d))
    _check_continuous(numbers.double() / 2**63, lambda x: x)
    assert numbers.unique().numel() == COUNT


@pytest.mark.parametrize("kind", KINDS)
def test_other_seeds_steps_operators_and_lanes_are_independent(kind: str) -> None:
    dtype = torch.int64 if kind == "bits" else F64
    keys = [{"seed": s, "step": t, "op_id": o} for s, t, o in product((0, 1), (0, 1), (0, 1))]
    drawn = [_drawn(kind, dtype, **key) for key in keys]
    drawn += [random((COUNT,), kind, _index((COUNT,)).lane(i), dtype, CPU) for i in (1, 2, 4, 8)]
    drawn += [drawn[0].roll(shift) for shift in (1, 2, 64)]
    correlation = torch.corrcoef(torch.stack(drawn).double()).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / COUNT**0.5


def test_the_words_of_one_number_are_independent() -> None:
    """A float64 has two hashes: the low digits are as uniform as the high ones."""
    numbers = _drawn("uniform") * 2.0**26
    _check_continuous(numbers.frac(), lambda x: x)
    whole = numbers.floor() * 2.0**-26
    correlation = torch.corrcoef(torch.stack([numbers.frac(), whole]))[0, 1]
    assert abs(correlation) < 5 / COUNT**0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(8,), (4, 6), (2, 4, 6), (4, 256, 512)])
def test_every_even_split_draws_the_same_numbers(kind: str, shape: tuple[int, ...]) -> None:
    dtype = torch.int64 if kind == "bits" else F64
    whole = random(shape, kind, _index(shape), dtype, CPU)
    for cuts in product((1, 2), repeat=len(shape)):
        sizes = [size // cut for size, cut in zip(shape, cuts, strict=True)]
        for place in product(*map(range, cuts)):
            starts = tuple(at * size for at, size in zip(place, sizes, strict=True))
            found = random(sizes, kind, RandomIndex(1, 2, 3, shape, starts), dtype, CPU)
            part = tuple(slice(a, a + size) for a, size in zip(starts, sizes, strict=True))
            torch.testing.assert_close(found, whole[part], rtol=1e-14, atol=0)


def test_scalars_and_empty_shapes_work() -> None:
    for shape in ((), (0,), (0, 4), (4, 0), (1, 1)):
        assert random(shape, "normal", _index(shape), torch.float32, CPU).shape == shape


@pytest.mark.parametrize("shape", [0.05, 0.5, 1.0, 2.5, 40.0])
def test_gamma_samples_have_their_distribution(shape: float) -> None:
    given = torch.full((COUNT,), shape, dtype=F64)
    _check_continuous(standard_gamma(given, _index((COUNT,))), lambda x: gammainc(given, x))


@pytest.mark.parametrize("rate", [0.1, 1.0, 7.5, 300.0])
def test_poisson_samples_have_their_distribution(rate: float) -> None:
    given = torch.full((COUNT,), rate, dtype=F64)
    _check_counts(
        poisson(given, _index((COUNT,))),
        lambda k: (k * torch.tensor(rate, dtype=F64).log() - rate - (k + 1).lgamma()).exp(),
    )


@pytest.mark.parametrize("count", [1, 5, 40, 1000])
@pytest.mark.parametrize("p", [0.02, 0.4, 0.5, 0.9])
def test_binomial_samples_have_their_distribution(count: int, p: float) -> None:
    n, chance = torch.full((COUNT,), float(count), dtype=F64), torch.full((COUNT,), p, dtype=F64)

    def mass(k: Tensor) -> Tensor:
        ways = n[0].add(1).lgamma() - (k + 1).lgamma() - (n[0] - k + 1).lgamma()
        return (ways + k * chance[0].log() + (n[0] - k) * (1 - chance[0]).log()).exp()

    _check_counts(binomial(n, chance, _index((COUNT,))), mass)


def test_samples_at_the_ends_of_a_domain() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    index = _index((4,))
    assert poisson(zero, index).equal(zero)
    assert binomial(5 * one, zero, index).equal(zero)
    assert binomial(50 * one, one, index).equal(50 * one)
    assert binomial(zero, one / 2, index).equal(zero)
    assert standard_gamma(zero, index).equal(one * torch.finfo(torch.float32).tiny)
    for wrong in (-one, one * torch.nan):
        assert standard_gamma(wrong, index).isnan().all()
        assert poisson(wrong, index).isnan().all()
    assert binomial(5 * one, one * torch.nan, index).isnan().all()


def test_rows_of_a_dirichlet_sum_to_one_and_have_its_moments() -> None:
    shapes = torch.tensor([0.5, 1.0, 3.0], dtype=F64).expand(COUNT, 3)
    rows = dirichlet(shapes, _index((COUNT, 3)))
    torch.testing.assert_close(rows.sum(1), torch.ones(COUNT, dtype=F64))
    mean = shapes[0] / shapes[0].sum()
    assert (rows.mean(0) - mean).abs().max() < 5 / COUNT**0.5
    assert (rows.var(0) - mean * (1 - mean) / 5.5).abs().max() < 5 / COUNT**0.5


@pytest.mark.parametrize("sampler", [standard_gamma, poisson])
def test_a_sample_is_a_function_of_its_own_element(sampler: Callable[..., Tensor]) -> None:
    given = torch.rand(64, 6, dtype=F64) * 20
    whole = sampler(given, _index((64, 6)))
    part = sampler(given[8:24, 3:], RandomIndex(1, 2, 3, (64, 6), (8, 3)))
    assert part.equal(whole[8:24, 3:])

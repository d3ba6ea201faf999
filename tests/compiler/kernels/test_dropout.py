"""Dropout by a hash of the global element index: its statistics, and its layouts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from meshwright.compiler.kernels.dropout import dropout, keep_scale
from meshwright.compiler.kernels.hashing import RandomIndex, keys_of, tables_of, write_hashes

CPU = torch.device("cpu")
COUNT = 1 << 20


def _index(shape: tuple[int, ...], seed: int = 1, step: int = 2, op_id: int = 3) -> RandomIndex:
    return RandomIndex(seed, step, op_id, shape, (0,) * len(shape))


def _hashes(shape: Sequence[int], index: RandomIndex) -> Tensor:
    """The hashes of a local tensor, all in one block."""
    tables = tables_of(index, tuple(shape), CPU)
    out = torch.empty(tables.grid, dtype=torch.int32)
    write_hashes(tables, slice(0, tables.grid[0]), keys_of(index), out, torch.empty_like(out))
    return out.view(tuple(shape))


def _bits(shape: tuple[int, ...] = (1024, 1024), **key: int) -> Tensor:
    return _hashes(shape, _index(shape, **key))


def _split_mix(seed: int, step: int, op_id: int) -> tuple[int, int]:
    """The two keys, from three rounds of SplitMix64's finalizer."""
    word = 1 << 64
    x = 0
    for part in (seed, step, op_id):
        x = (x + 2 * part + 1) * 0x9E3779B97F4A7C15 % word
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % word
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % word
        x ^= x >> 31
    return x % (1 << 32), x >> 32


def _reference(number: int, keys: tuple[int, int]) -> int:
    """The hash of one element, in Python integers."""
    word = 1 << 32
    x = (number * 0x9E3779B1 + keys[0]) % word
    x = (x ^ (x >> 16)) * 0x21F0AAAD % word
    x ^= keys[1]
    x = (x ^ (x >> 15)) * 0x735A2D97 % word
    return (x + word // 2) % word - word // 2


def _chi_square(counts: Tensor) -> float:
    """How many standard deviations the chi-square statistic of equal bins is above its mean."""
    expected = counts.sum() / counts.numel()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.numel() - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def test_the_hash_is_its_definition_in_wrapping_int32() -> None:
    keys = _split_mix(1, 2, 3)
    found = _bits((7, 300)).reshape(-1).tolist()
    assert found == [_reference(number, keys) for number in range(2100)]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_kept_elements_is_one_minus_p(p: float) -> None:
    out = dropout(torch.ones(COUNT), p, _index((COUNT,)))
    deviation = (p * (1 - p) / COUNT) ** 0.5
    assert abs((out == 0).double().mean().item() - p) < 4 * deviation
    torch.testing.assert_close(out.unique(), torch.tensor([0, 1 / (1 - p)]))


def test_a_probability_of_0_keeps_and_of_1_drops_everything() -> None:
    x = torch.randn(5, 7)
    torch.testing.assert_close(dropout(x, 0.0, _index((5, 7))), x)
    assert not dropout(x, 1.0, _index((5, 7))).any()


def test_no_two_elements_of_a_tensor_share_a_hash() -> None:
    assert _bits().unique().numel() == COUNT


def test_every_bit_from_the_tenth_is_uniform() -> None:
    bits = _bits().reshape(-1)
    for place in range(10, 32):
        ones = ((bits >> place) & 1).double().mean().item()
        assert abs(ones - 0.5) < 4 * 0.5 / COUNT**0.5, f"bit {place}"


@pytest.mark.parametrize("stride", [1, 2, 3, 64, 768, 1024, 4096, 65536])
def test_neighbours_at_any_distance_are_independent(stride: int) -> None:
    high = (_bits().reshape(-1) >> 26) & 63
    pairs = high[:-stride] * 64 + high[stride:]
    assert abs(_chi_square(torch.bincount(pairs, minlength=4096).double())) < 5


def test_rows_and_columns_of_a_power_of_two_are_balanced() -> None:
    kept = (_bits((4096, 256)) >= 0).double()
    for dim in (0, 1):
        means = kept.mean(dim)
        deviation = 0.5 / kept.shape[dim] ** 0.5
        assert (means - 0.5).abs().max() < 5.5 * deviation
        assert abs(means.std() / deviation - 1) < 0.2


def test_runs_of_kept_elements_have_the_lengths_of_coin_tosses() -> None:
    kept = _bits().reshape(-1, 16) >= 0
    patterns = (kept * (1 << torch.arange(16))).sum(1)
    counts = torch.bincount(patterns & 1023, minlength=1024).double()
    assert abs(_chi_square(counts)) < 5


KEYS = [
    {"seed": seed, "step": step, "op_id": op_id}
    for seed, step, op_id in product((0, 1, 1 << 40), (0, 1, 2), (0, 1, 7))
]


def test_masks_of_other_seeds_steps_and_operators_are_independent() -> None:
    masks = torch.stack([(_bits((256, 256), **key) >= 0).reshape(-1) for key in KEYS]).double()
    correlation = torch.corrcoef(masks).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 256


def test_other_keys_are_not_shifts_of_one_sequence() -> None:
    numbers = [set(_bits((512, 512), **key).reshape(-1).tolist()) for key in KEYS[:6]]
    for one, other in pairwise(numbers):
        assert len(one & other) < 60  # 16 are expected by chance
    first, second = (_bits((64, 64), step=step).reshape(-1) for step in (0, 1))
    deltas = (first.long().unsqueeze(1) - second.long()) % (1 << 32)
    assert (deltas == 0).sum() < 4


def _sharded(x: Tensor, cuts: tuple[int, ...], index: RandomIndex) -> Tensor:
    """The global result, put together from the shards of an even cut of each dim."""
    out = torch.empty_like(x)
    sizes = [size // cut for size, cut in zip(x.shape, cuts, strict=True)]
    for place in product(*map(range, cuts)):
        starts = [at * size for at, size in zip(place, sizes, strict=True)]
        part = tuple(slice(a, a + size) for a, size in zip(starts, sizes, strict=True))
        local = RandomIndex(index.seed, index.step, index.op_id, index.shape, tuple(starts))
        out[part] = dropout(x[part], 0.3, local)
    return out


@pytest.mark.parametrize("shape", [(8,), (8, 12), (4, 6, 8), (2, 4, 6, 8), (4, 256, 1024)])
def test_every_even_split_draws_the_same_numbers(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    index = _index(shape)
    whole = dropout(x, 0.3, index)
    for cuts in product((1, 2), repeat=len(shape)):
        assert torch.equal(_sharded(x, cuts, index), whole)


def test_composite_dims_are_given_by_their_coordinates() -> None:
    x = torch.randn(6, 24)
    whole = dropout(x, 0.3, _index((6, 24)))
    columns = torch.arange(24).view(3, 2, 4)[:, 1].reshape(-1)
    index = RandomIndex(1, 2, 3, (6, 24), (torch.tensor([1, 4]), columns))
    local = dropout(x[[1, 4]][:, columns], 0.3, index)
    assert torch.equal(local, whole[[1, 4]][:, columns])


def test_narrowing_an_index_is_narrowing_the_numbers() -> None:
    index = RandomIndex(1, 2, 3, (6, 24), (0, torch.arange(24)))
    whole = keep_scale((6, 24), 0.3, index, torch.float32, CPU)
    part = keep_scale((4, 5), 0.3, index.narrow(0, 2, 4).narrow(1, 9, 5), torch.float32, CPU)
    assert torch.equal(part, whole[2:, 9:14])


HUGE = (1 << 12, 1 << 11, 1 << 13)  # 2**36 elements: 24 bits inside, 12 outside


def test_the_second_word_draws_the_same_numbers_under_every_split() -> None:
    starts = (37, 100, 8000)
    whole = _hashes((4, 6, 8), RandomIndex(1, 2, 3, HUGE, starts))
    for cuts in product((1, 2), repeat=3):
        sizes = [size // cut for size, cut in zip((4, 6, 8), cuts, strict=True)]
        for place in product(*map(range, cuts)):
            here = [at * size for at, size in zip(place, sizes, strict=True)]
            first = tuple(a + b for a, b in zip(starts, here, strict=True))
            part = tuple(slice(a, a + size) for a, size in zip(here, sizes, strict=True))
            found = _hashes(sizes, RandomIndex(1, 2, 3, HUGE, first))
            assert torch.equal(found, whole[part])


@pytest.mark.parametrize("apart", [1, 2, 3, 256, 4095])
def test_blocks_of_other_second_words_are_independent_and_uniform(apart: int) -> None:
    one, other = (
        _hashes((1, 64, 1 << 13), RandomIndex(1, 2, 3, HUGE, (at, 0, 0))).reshape(-1)
        for at in (0, apart)
    )
    for shift in (0, apart):  # a sum of both words would agree along the diagonal
        high, low = ((x >> 26) & 63 for x in (one[shift:], other[: len(other) - shift]))
        pairs = high * 64 + low
        assert abs(_chi_square(torch.bincount(pairs, minlength=4096).double())) < 5
    shared = set(one.tolist()) & set(other.tolist())
    assert len(shared) < 130  # 64 are expected by chance; a shift of one sequence shares most


def test_numbers_along_the_second_word_are_uniform() -> None:
    shape = (1 << 20, 1 << 16)
    column = _hashes((1 << 20, 1), RandomIndex(1, 2, 3, shape, (0, 5))).reshape(-1)
    assert abs(_chi_square(torch.bincount((column >> 20) & 4095, minlength=4096).double())) < 5
    high = (column >> 26) & 63
    pairs = high[:-1] * 64 + high[1:]
    assert abs(_chi_square(torch.bincount(pairs, minlength=4096).double())) < 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_type_has_the_same_mask(dtype: torch.dtype) -> None:
    x = torch.randn(64, 96).to(dtype)
    out = dropout(x, 0.1, _index((64, 96)))
    assert out.dtype == dtype
    kept = keep_scale((64, 96), 0.1, _index((64, 96)), torch.float64, CPU)
    torch.testing.assert_close(out, (x.double() * kept).to(dtype))


def test_transposed_empty_and_scalar_tensors_work() -> None:
    x = torch.randn(6, 4)
    assert torch.equal(
        dropout(x.T.contiguous().T, 0.3, _index((6, 4))), dropout(x, 0.3, _index((6, 4)))
    )
    assert dropout(torch.empty(0, 4), 0.3, _index((8, 4))).shape == (0, 4)
    assert dropout(torch.empty(4, 0), 0.3, _index((4, 8))).shape == (4, 0)
    assert dropout(torch.ones(()), 0.3, _index(())).shape == ()

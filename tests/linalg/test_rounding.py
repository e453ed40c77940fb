"""Stochastic rounding: to one of the two neighbours, right on average."""

import pytest
import torch
from shapes import MATRICES, matrix

from gradlr.errors import ArgumentError
from gradlr.linalg import stochastic_round

HALVES = [torch.bfloat16, torch.float16]


def all_finite_numbers(dtype):
    """Every finite number of a 16-bit format, ascending, in float64."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double()
    return numbers[numbers.isfinite()].unique()


def neighbours(x, dtype):
    """The largest number not above and the smallest not below, in float64."""
    table = all_finite_numbers(dtype)
    x = x.double().contiguous()
    return table[torch.searchsorted(table, x, right=True) - 1], table[torch.searchsorted(table, x)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def wide_range(dtype, source):
    """Numbers of both signs over the whole range of the format: normal, subnormal, and below the smallest subnormal."""
    limits = torch.finfo(dtype)
    low, high = torch.tensor([limits.tiny, limits.max], dtype=torch.float64).log2().tolist()
    exponents = torch.linspace(low - 14, high - 1, 4000, dtype=torch.float64)
    signs = torch.randint(0, 2, (4000,)).double() * 2 - 1
    return (signs * exponents.exp2()).to(source)


@pytest.mark.parametrize("source", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_result_is_one_of_the_two_neighbours_over_the_whole_range(dtype, source):
    x = wide_range(dtype, source)
    result = stochastic_round(x, dtype, generator=seeded(1))
    below, above = neighbours(x, dtype)
    assert result.dtype == dtype and result.shape == x.shape
    assert ((result.double() == below) | (result.double() == above)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_both_neighbours_occur(dtype):
    x = torch.full((200,), 1.0 + torch.finfo(dtype).eps / 2)  # halfway: one side only has probability 2^-199
    assert stochastic_round(x, dtype).unique().numel() == 2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", list(MATRICES))
def test_the_expected_value_is_the_number_itself(name, dtype):
    x = matrix(name, torch.float32)
    draws = 4000
    result = stochastic_round(x.expand(draws, *x.shape), dtype, generator=seeded(2)).double()
    below, above = neighbours(x, dtype)
    share = torch.where(above > below, (x.double() - below) / (above - below).clamp(min=1e-300), 0.0)
    error = (above - below) * (share * (1 - share) / draws).sqrt()
    mean_error = (result.mean(dim=0) - x.double()).abs()
    # 5 standard errors; where a share is within 1e-3 of 0 or 1 the count is small and skewed: one draw's worth on top.
    assert (mean_error <= 5 * error + (above - below) / draws).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sign", [1, -1])
def test_subnormal_numbers_are_rounded_without_bias(dtype, sign):
    smallest = all_finite_numbers(dtype)
    smallest = smallest[smallest > 0][0].item()
    draws = 20_000
    x = torch.full((draws,), 0.3 * smallest * sign, dtype=torch.float64)
    result = stochastic_round(x, dtype, generator=seeded(3)).double()
    # Share of a coin with p = 0.3 over 20,000 throws: 5 standard errors.
    assert abs((result / (smallest * sign)).mean().item() - 0.3) < 5 * (0.3 * 0.7 / draws) ** 0.5
    assert set(result.tolist()) == {0.0, smallest * sign}


@pytest.mark.parametrize("dtype", HALVES)
def test_every_representable_number_comes_back_unchanged(dtype):
    x = all_finite_numbers(dtype)
    assert torch.equal(stochastic_round(x, dtype).double(), x)
    assert torch.equal(stochastic_round(x.float(), dtype).double(), x)


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_and_infinity_come_back_unchanged(dtype):
    result = stochastic_round(torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0]), dtype)
    torch.testing.assert_close(result.float(), torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0]), equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_numbers_beyond_the_largest_become_the_largest(dtype, sign):
    largest = torch.finfo(dtype).max
    x = sign * torch.tensor([largest * (1 + 1e-4), largest * (1 + 2e-3), 1e39, 1e100, 1e300], dtype=torch.float64)
    for seed in range(5):
        assert (stochastic_round(x, dtype, generator=seeded(seed)).double() == sign * largest).all()


def test_the_largest_float32_becomes_the_largest_bfloat16():
    x = torch.full((100,), torch.finfo(torch.float32).max)
    assert (stochastic_round(x, torch.bfloat16) == torch.finfo(torch.bfloat16).max).all()


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("name", list(MATRICES))
def test_huge_and_tiny_entries_stay_finite(name, scale):
    x = matrix(name, torch.float32) * scale
    result = stochastic_round(x, torch.bfloat16)
    assert result.isfinite().all()
    # One step of bfloat16 is at most 2^-7 of the number.
    torch.testing.assert_close(result.float(), x, rtol=2**-7, atol=0)


def test_the_same_generator_state_gives_the_same_numbers_and_another_does_not():
    x = matrix("tall", torch.float32)
    first, again, other = (stochastic_round(x, torch.bfloat16, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_a_generator_torchs_own_is_used():
    x = matrix("tall", torch.float32)
    torch.manual_seed(5)
    assert torch.equal(stochastic_round(x, torch.bfloat16), stochastic_round(x, torch.bfloat16, generator=seeded(5)))


def test_the_layout_of_the_input_does_not_matter():
    x = matrix("tall", torch.float32)
    sliced, strided = stochastic_round(x.mT, torch.bfloat16, generator=seeded(5)), x.mT.contiguous()
    assert torch.equal(sliced, stochastic_round(strided, torch.bfloat16, generator=seeded(5)))


def test_the_input_is_left_alone():
    x = matrix("tall", torch.float32)
    before = x.clone()
    stochastic_round(x, torch.bfloat16)
    assert torch.equal(x, before)


def test_a_hundred_small_steps_arrive_on_average_where_rounding_to_nearest_stands_still():
    count, generator = 2000, seeded(4)
    weights = torch.ones(count, dtype=torch.bfloat16)
    nearest = torch.ones((), dtype=torch.bfloat16)
    for _ in range(100):
        weights = stochastic_round(weights.float() + 1e-3, torch.bfloat16, generator=generator)
        nearest = (nearest.float() + 1e-3).bfloat16()
    assert nearest.item() == 1
    # Each step's deviation is below √(p (1 − p)) of a bfloat16 step of 2^-7 with p = 1e-3 · 2^7: 100 steps, 2000 weights.
    deviation = 2**-7 * (0.128 * 0.872) ** 0.5 * (100 / count) ** 0.5
    assert abs(weights.double().mean().item() - 1.1) < 5 * deviation


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_another_dtype_is_refused_by_name(dtype):
    with pytest.raises(ArgumentError, match=str(dtype)):
        stochastic_round(torch.zeros(3), dtype)

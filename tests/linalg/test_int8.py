"""int8 codes: what they hold, what is computed with them, and how an update is written into them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

from gradlr import ArgumentError
from gradlr.linalg import int8
from gradlr.linalg.int8 import LARGEST, Int8Weight, quantized, subtracted, times_scales

# Groups that fit the row, that leave a shorter one, and one that is longer than the row.
GROUPS = [8, 7, 64]


def matrix(dtype=torch.float64, shape=(9, 24)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def weight_of(group, dtype=torch.float64):
    weight = Int8Weight.of(matrix(dtype), group)
    return weight, weight.dequantized()


@pytest.fixture(autouse=True)
def blocks_of_a_few_numbers(monkeypatch):
    monkeypatch.setattr(int8, "_BLOCK_NUMBERS", 30)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_entries_are_rounded_to_half_a_code(group, dtype):
    """And to half of the dtype's own last place, where codes and scales are multiplied in it."""
    x = matrix(dtype)
    weight = Int8Weight.of(x, group)
    units = times_scales(torch.ones(x.shape, dtype=torch.float64), weight.scales, group)
    error = (weight.dequantized(torch.float64) - x.double()).abs()
    assert (error <= units * (0.5 + 1e-3)).all()
    assert weight.codes.dtype == torch.int8 and int(weight.codes.min()) >= -LARGEST
    assert weight.scales.shape == (9, -(-24 // group)) and weight.dtype == dtype


def test_a_group_of_zeros_stays_zero_and_can_be_left():
    codes, scales = quantized(torch.zeros(1, 4), 4)
    assert not codes.any() and (scales > 0).all()
    codes, scales, _ = subtracted(codes, scales, torch.tensor([[1e-3, 0, -5e-4, 0]]), 4, decay=1.0, generator=None)
    torch.testing.assert_close(codes * scales, torch.tensor([[-1e-3, 0, 5e-4, 0]]), rtol=0, atol=1e-3 / 100)


@pytest.mark.parametrize("group", GROUPS)
def test_products_and_gradients_are_those_of_the_ordinary_weight(group):
    """To float64's rounding: forward, the input's gradient, and the weight's own, which is an ordinary tensor."""
    codes, plain = weight_of(group)
    parameters = nn.Parameter(codes), nn.Parameter(plain)
    x, bias, ids = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(9, dtype=torch.float64), torch.randint(9, (3, 4))
    for compute in (
        lambda w, x: F.linear(x, w, bias), lambda w, x: F.linear(x, w), lambda w, x: F.linear(x[0, 0], w), lambda w, x: w @ x.mT,
        lambda w, x: F.embedding(ids, w), lambda w, x: (w[2:5] * 2).sum() + w.norm(),
    ):  # fmt: skip
        found = []
        for weight in parameters:
            weight.grad, given = None, x.clone().requires_grad_()
            output = compute(weight, given)
            output.square().sum().backward()
            found.append([output, weight.grad, *([] if given.grad is None else [given.grad])])
        assert type(found[0][1]) is torch.Tensor
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_change_changes_no_code():
    codes, scales = quantized(matrix(torch.float32), 8)
    after = subtracted(codes, scales, torch.zeros(9, 24), 8, decay=1.0, generator=None)
    assert torch.equal(after[0], codes) and torch.equal(after[1], scales)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("decay", [1.0, 0.98, torch.tensor(0.98)])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_updates_are_right_in_the_mean(group, decay, is_mirrored):
    """1,000 writes of one update; their mean lies within five standard errors, of at most half a unit each, of it."""
    codes, scales = quantized(matrix(torch.float32), group)
    units = times_scales(torch.ones(9, 24), scales, group)
    change = units * torch.randn(9, 24, generator=torch.Generator().manual_seed(1)) * 0.3
    generator, total, count = torch.Generator().manual_seed(2), torch.zeros(9, 24, dtype=torch.float64), 1000
    for _ in range(count):
        options = {"decay": decay, "generator": generator, "is_mirrored": is_mirrored}
        new_codes, new_scales, error = subtracted(codes, scales, change.clone(), group, **options)
        total += times_scales(new_codes.double(), new_scales, group)
    wanted = times_scales(codes.double(), scales, group) * float(decay) - change
    torch.testing.assert_close(times_scales(new_codes.double(), new_scales, group) - error, wanted, rtol=0, atol=1e-5)
    assert ((total / count - wanted).abs() / units).max() < 5 * 0.5 / count**0.5


def random_walk(steps, shares_numbers, shape=(40, 64)):
    """Codes and exact sums, in code units, after changes of 0.1 in the mean that have nothing to do with each other."""
    codes, scales = torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0], 1, dtype=torch.float64)
    changes, generator, total = torch.Generator().manual_seed(0), torch.Generator(), torch.zeros(shape, dtype=torch.float64)
    for step in range(steps):
        change = torch.randn(shape, generator=changes, dtype=torch.float64) / 8
        total -= change
        seed, is_mirrored = (step // 2, step % 2 == 1) if shares_numbers else (step, False)
        options = {"decay": 1.0, "generator": generator.manual_seed(100 + seed), "is_mirrored": is_mirrored}
        codes, scales, _ = subtracted(codes, scales, change, 64, **options)
    return codes, total


def test_mirrored_numbers_take_back_what_is_taken_back():
    """A change and its opposite: the second write undoes each step of the first; independent ones would add their errors."""
    codes, scales = quantized(matrix(), 8)
    change = times_scales(torch.full((9, 24), 0.3, dtype=torch.float64), scales, 8) * matrix().sign()
    options, generator = {"decay": 1.0}, torch.Generator()
    moved, scales, _ = subtracted(codes, scales, change.clone(), 8, generator=generator.manual_seed(0), **options)
    options["is_mirrored"] = True
    back, _, _ = subtracted(moved, scales, -change, 8, generator=generator.manual_seed(0), **options)
    assert (moved != codes).sum() > 20 and torch.equal(back, codes)


def test_pairs_with_mirrored_numbers_add_less_noise():
    """Of a variance E |u| a write, E min(|u|, |v|) / 2 is taken back: 0.29 for Gaussian changes, here a little more."""
    found = [(codes - total).square().mean() for codes, total in (random_walk(60, True), random_walk(60, False))]
    assert found[1] == pytest.approx(60 * 0.1 * 0.85, rel=0.1)
    assert found[0] < 0.75 * found[1]


def test_an_update_far_below_a_unit_is_not_lost_beside_a_large_code():
    """A millionth of a unit, beside codes of 127, where float32 knows only the eighth of a millionth of a hundred."""
    codes, scales = torch.full((400, 5000), LARGEST - 1, dtype=torch.int8), torch.ones(400, 1)
    change = torch.full((400, 5000), -2e-5)
    moved = subtracted(codes, scales, change, 5000, decay=1.0, generator=torch.Generator().manual_seed(0))[0] - codes
    assert 25 <= int(moved.sum()) <= 55  # 40 in the mean, of a variance of 40


def test_only_a_group_that_does_not_fit_gets_a_new_scale():
    weight = matrix(torch.float32)
    codes, scales = quantized(weight, 8)
    change = torch.zeros(9, 24)
    change[3, 9] = -4 * weight[3, 8:16].abs().max()
    new_codes, new_scales, _ = subtracted(codes, scales, change.clone(), 8, decay=1.0, generator=None)
    is_new = new_scales != scales
    assert is_new.nonzero().tolist() == [[3, 1]] and new_scales[3, 1] > scales[3, 1]
    is_other = torch.ones(9, 24, dtype=torch.bool)
    is_other[3, 8:16] = False
    assert torch.equal(new_codes[is_other], codes[is_other])
    # The others of the group are rounded to the wider grid: to less than one unit.
    error = times_scales(new_codes.float(), new_scales, 8) - (times_scales(codes.float(), scales, 8) - change)
    assert error[3, 8:16].abs().max() < new_scales[3, 1]
    assert int(new_codes[3, 9]) < LARGEST  # with room for the next ones


def test_copies_and_casts_and_what_is_refused():
    weight, plain = weight_of(8, torch.float32)
    parameter = nn.Parameter(weight)
    copied, cast = copy.deepcopy(parameter), parameter.to(torch.bfloat16)
    assert isinstance(copied, Int8Weight) and isinstance(copied, nn.Parameter) and copied.requires_grad
    assert copied.codes.data_ptr() != weight.codes.data_ptr() and torch.equal(copied.dequantized(), plain)
    assert isinstance(cast, Int8Weight) and cast.dtype == torch.bfloat16 and torch.equal(cast.codes, weight.codes)
    with torch.no_grad():
        assert torch.equal(copied.copy_(plain * 2).codes, weight.codes)
        assert torch.equal(torch.empty(9, 24).copy_(weight), plain)
        assert torch.equal(weight.t().t().dequantized(), plain) and torch.equal(weight.mT.dequantized(), plain.mT)
        assert torch.equal(weight[:, 3:5], plain[:, 3:5]) and torch.equal(weight.mT[1:2], plain.mT[1:2])
    assert "group=8" in repr(weight)
    with pytest.raises(ArgumentError, match="dequantize_"), torch.no_grad():
        weight.add_(1)
    with pytest.raises(ArgumentError, match="fully_shard"):
        weight.chunk(2)

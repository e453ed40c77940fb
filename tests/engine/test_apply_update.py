"""Writing a direction into a weight: block by block where something is widened or scaled, and the same as in one piece."""

import pytest
import torch

from gradlr.engine.apply_update import apply_update
from gradlr.layers import View
from gradlr.rules import Update

VIEWS = {
    "as it is": (View(), (40, 12)),
    "transposed": (View("i o -> o i"), (12, 40)),
    "batched": (View("b m n -> b m n"), (3, 40, 12)),
}


def update_of(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    *batch, m, n = shape
    left, right = (torch.randn(*batch, size, 3, generator=generator) for size in (m, n))
    scale = torch.rand(*batch, m, 1, generator=generator)
    return Update(left=left, right=right, row_scale=scale, dense=None)


@pytest.mark.parametrize("name", list(VIEWS))
@pytest.mark.parametrize("numbers", [1, 60, 10_000])
def test_blocks_make_no_difference(name, numbers, monkeypatch):
    monkeypatch.setattr("gradlr.engine.apply_update._BLOCK_NUMBERS", numbers)
    view, shape = VIEWS[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    update = update_of(view.of(weight).shape)
    direction = (update.row_scale * update.left) @ update.right.mT
    expected = 0.9 * weight - 0.5 * view.back(direction, weight.shape)
    apply_update(weight, view, update, lr=0.5, weight_decay=0.2, generator=torch.Generator())
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numbers", [60, 100_000])
@pytest.mark.parametrize("has_dense", [False, True])
def test_narrow_weights_are_rounded_without_bias_in_every_block(dtype, numbers, has_dense, monkeypatch):
    """A twentieth of a unit in the last place, 200 times: rounding to nearest would leave every weight as it is."""
    monkeypatch.setattr("gradlr.engine.apply_update._BLOCK_NUMBERS", numbers)
    weight, generator = torch.ones(40, 12).to(dtype), torch.Generator().manual_seed(0)
    step = torch.finfo(dtype).eps / 40  # below 1 the spacing is half of eps
    left, right = torch.full((40, 1), step), torch.ones(12, 1)
    for _ in range(200):
        update = Update(dense=left @ right.mT) if has_dense else Update(left=left, right=right)
        apply_update(weight, View(), update, lr=1.0, weight_decay=0.0, generator=generator)
    moved = (1 - weight.double()).mean(dim=1)
    # Twelve weights a row, each a walk of 200 draws of probability 1/20: the mean is off by 3.1 / sqrt(12) units of 10.
    torch.testing.assert_close(moved, torch.full((40,), 200 * step).double(), rtol=0.4, atol=0)
    assert moved.mean() == pytest.approx(200 * step, rel=0.05)

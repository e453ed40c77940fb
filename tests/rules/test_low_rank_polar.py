"""LowRankPolar against its float64 reference, and what it promises by itself."""

from dataclasses import replace

import pytest
import torch
from reference.decompositions import best_approximation, leading_directions, polar_factor
from reference.low_rank_polar import LowRankPolarReference
from rules.driving import context, descend, first_state, random_gradients, standard_normals
from torch import nn

import gradlr
from gradlr import ArgumentError
from gradlr.gradient import Dense, Sketched
from gradlr.linalg import newton_schulz
from gradlr.rules import LowRankPolar
from gradlr.rules.base import update_scale
from gradlr.tensors import mixed_seed

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (16, 16)}
OPTIONS = {
    "plain": ({}, {}),
    "no_residual": ({"residual": 0.0}, {}),
    "whole_residual": ({"residual": 1.0}, {}),
    "decay": ({}, {"weight_decay": 0.1}),
}
COUNT = 20
# float64, 20 steps: 1e-16 of rounding, times the condition of Gram matrix, basis and small residuals, some 1e5 in all.
TIGHT = {"rtol": 0.0, "atol": 1e-10}
# Where only the basis differs: 1e-7 stands beside the norm of a matrix whose largest entry, one, depends on the basis.
ANY_BASIS = {"rtol": 0.0, "atol": 1e-7}


def reference_for(weight, rule, *, rank, momentum_rank, lr, beta, weight_decay=0.0):
    return LowRankPolarReference(
        weight.numpy(), rank=rank, momentum_rank=momentum_rank, lr=lr, beta=beta, weight_decay=weight_decay,
        residual=rule.residual,
    )  # fmt: skip


def one_update(rule, gradient, *, rank, momentum_rank=2, **options):
    state = first_state(rule, gradient.shape, gradient.dtype, rank=rank, momentum_rank=momentum_rank)
    return rule.update(Dense(gradient), state, context(rank, momentum_rank, **options))


def residual_of(update):
    return replace(update, left=None, right=None).direction()


def same_space(one, other):
    """Cosines of the principal angles between two column spaces of equal dimension."""
    return torch.linalg.svdvals(torch.linalg.qr(one).Q.mT @ torch.linalg.qr(other).Q)


# -- the reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize(("options", "writing"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("rank", "momentum_rank"), [(4, 2), (4, 4), (10, 3), (4, 0)])
def test_twenty_steps_are_the_references(shape, decay, options, writing, rank, momentum_rank):
    rule, common = LowRankPolar(**options), {"rank": rank, "momentum_rank": momentum_rank, "lr": 0.05, "beta": 0.9}
    weight, gradients = torch.randn(shape, dtype=torch.float64), random_gradients(shape, COUNT, decay=decay)
    state = first_state(rule, shape, rank=rank, momentum_rank=momentum_rank)
    weights, _ = descend(rule, state, gradients, weight=weight, **common, **writing)
    reference = reference_for(weight, rule, **common, **writing)
    for step, (gradient, found) in enumerate(zip(gradients, weights, strict=True), start=1):
        reference.step(gradient.numpy(), standard_normals((shape[1], rank), step=step).numpy())
        torch.testing.assert_close(found, torch.from_numpy(reference.weight), **TIGHT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twenty_steps_of_the_optimizer_are_the_references(shape):
    model = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    tracker = gradlr.LossTracker()
    options = {"rank": 5, "momentum_rank": 2, "lr": 0.05, "beta": 0.8, "weight_decay": 0.1}
    opt = gradlr.attach(model, tracker, seed=7, **options)
    reference = reference_for(model.weight.detach(), LowRankPolar(), **options)
    for step, gradient in enumerate(random_gradients(shape, COUNT), start=1):
        tracker(1.0)
        opt.receive(model.weight, Dense(gradient))
        generator = torch.Generator().manual_seed(mixed_seed(7, 0, step))
        reference.step(gradient.numpy(), torch.randn(shape[1], 5, dtype=torch.float64, generator=generator).numpy())
        torch.testing.assert_close(model.weight.detach(), torch.from_numpy(reference.weight), **TIGHT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_of_rank_two_and_zero_ones_between_are_the_references(shape):
    rule, common = LowRankPolar(), {"rank": 6, "momentum_rank": 4, "lr": 0.05, "beta": 0.9}
    left = torch.randn(shape[0], 2, dtype=torch.float64)
    gradients = [left @ torch.randn(2, shape[1], dtype=torch.float64) for _ in range(6)]
    gradients[3] = torch.zeros(shape, dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    weights, _ = descend(rule, first_state(rule, shape, rank=6, momentum_rank=4), gradients, weight=weight, **common)
    reference = reference_for(weight, rule, **common)
    for step, (gradient, found) in enumerate(zip(gradients, weights, strict=True), start=1):
        reference.step(gradient.numpy(), standard_normals((shape[1], 6), step=step).numpy())
        torch.testing.assert_close(found, torch.from_numpy(reference.weight), **TIGHT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_stays_near_the_float64_reference(shape):
    rule, common = LowRankPolar(), {"rank": 4, "momentum_rank": 2, "lr": 0.05, "beta": 0.9}
    weight, gradients = torch.randn(shape), [gradient.float() for gradient in random_gradients(shape, 1)]
    weights, _ = descend(rule, first_state(rule, shape, torch.float32), gradients, weight=weight, **common)
    reference = reference_for(weight, rule, **common)
    drawn = standard_normals((shape[1], 4), step=1, dtype=torch.float32)
    reference.step(gradients[0].double().numpy(), drawn.double().numpy())
    # 6e-8 of rounding, times the condition of basis and residual, below 1e2.
    torch.testing.assert_close(weights[0].double(), torch.from_numpy(reference.weight), rtol=0, atol=1e-5)


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 12, 9), (2, 2, 7, 11)])
def test_a_batch_is_a_loop_where_the_rank_is_full(shape):
    # Full rank: the basis spans everything, so that the random numbers, which differ, do not matter.
    full, rule = min(shape[-2:]), LowRankPolar()
    options = {"rank": full, "momentum_rank": full, "lr": 0.1}
    gradients, weight = random_gradients(shape, 5), torch.zeros(shape, dtype=torch.float64)
    state = first_state(rule, shape, rank=full, momentum_rank=full)
    found = descend(rule, state, gradients, weight=weight, **options)[0][-1].reshape(-1, *shape[-2:])
    for index, one in enumerate(found):
        single = [gradient.reshape(-1, *shape[-2:])[index] for gradient in gradients]
        state = first_state(rule, shape[-2:], rank=full, momentum_rank=full)
        alone = descend(rule, state, single, weight=torch.zeros(shape[-2:], dtype=torch.float64), **options)[0][-1]
        torch.testing.assert_close(one, alone, **ANY_BASIS)


@pytest.mark.parametrize("residual", [0.0, 0.5])
def test_a_batch_is_a_loop_where_the_same_random_numbers_are_fed(residual):
    shape, rule, common = (3, 12, 9), LowRankPolar(residual=residual), {"rank": 4, "momentum_rank": 2, "lr": 0.1, "beta": 0.9}
    gradients, weight = random_gradients(shape, 5), torch.randn(shape, dtype=torch.float64)
    weights, _ = descend(rule, first_state(rule, shape), gradients, weight=weight, **common)
    references = [reference_for(one, rule, **common) for one in weight]
    for step, (gradient, found) in enumerate(zip(gradients, weights, strict=True), start=1):
        drawn = standard_normals((3, 9, 4), step=step)
        for index, reference in enumerate(references):
            reference.step(gradient[index].numpy(), drawn[index].numpy())
            torch.testing.assert_close(found[index], torch.from_numpy(reference.weight), **TIGHT)


# -- what it promises by itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_momentum_has_an_orthonormal_left_factor(shape):
    rule = LowRankPolar()
    _, state = descend(
        rule, first_state(rule, shape, momentum_rank=3), random_gradients(shape, 6, decay=0.7), rank=5, momentum_rank=3,
        lr=0.1, weight=torch.zeros(shape, dtype=torch.float64),
    )  # fmt: skip
    # The last Cholesky pass leaves its shift, 1e-13, once per factor of P.
    torch.testing.assert_close(state["P"].mT @ state["P"], torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_update_is_about_the_polar_factor_of_what_the_basis_sees(shape, rank):
    (gradient,) = random_gradients(shape, 1)
    update, _ = one_update(LowRankPolar(residual=0), gradient, rank=rank)
    basis = update.left
    seen = polar_factor(gradient.mT @ basis)
    # Newton-Schulz steps leave singular vectors where they are: rounding and shifts of 1e-13, times the condition.
    torch.testing.assert_close(polar_factor(update.right), seen, rtol=0, atol=1e-9)
    # Five of Muon's steps bring values of a well conditioned matrix to 0.7 up to 1.2.
    values = torch.linalg.svdvals(update.right) / update_scale(shape, rank)
    assert values.min() > 0.65 and values.max() < 1.25


@pytest.mark.parametrize("shape", [SHAPES["wide"], SHAPES["square"], (3, *SHAPES["wide"])], ids=str)
def test_where_r_is_all_rows_the_update_is_the_polar_factor_of_the_gradient_and_nothing_is_drawn(shape):
    gradient, told = torch.randn(shape, dtype=torch.float64), context(shape[-2], 0)
    before = told.generator.get_state()
    update, _ = LowRankPolar().update(Dense(gradient), {}, told)
    expected = update_scale(gradient.shape, shape[-2]) * newton_schulz(gradient, dtype=torch.float64)
    torch.testing.assert_close(update.direction(), expected, rtol=1e-5, atol=1e-5)  # the notebook's divides by norm + 1e-7
    assert torch.equal(before, told.generator.get_state())


def test_at_full_rank_with_full_momentum_it_is_muon_with_nesterov_momentum():
    rule, n, beta, lr = LowRankPolar(), 12, 0.9, 0.01
    gradients, weight = random_gradients((n, n), COUNT), torch.randn(n, n, dtype=torch.float64)
    state = first_state(rule, (n, n), rank=n, momentum_rank=n)
    weights, state = descend(rule, state, gradients, weight=weight, rank=n, momentum_rank=n, lr=lr, beta=beta)
    momentum = torch.zeros_like(weight)
    for gradient, found in zip(gradients, weights, strict=True):
        momentum = beta * momentum + gradient
        weight = weight - lr * 2 * n**0.5 * newton_schulz(2.0**30 * (gradient + beta * momentum), dtype=torch.float64)
        torch.testing.assert_close(found, weight, **ANY_BASIS)
    torch.testing.assert_close(state["P"] @ state["R"].mT, momentum, **TIGHT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("rank", "momentum_rank"), [(4, 1), (6, 3), (10, 4)])
def test_the_momentum_that_is_kept_is_about_the_best_one_of_its_rank(shape, rank, momentum_rank):
    (gradient,) = random_gradients(shape, 1, decay=0.5)
    update, state = one_update(LowRankPolar(), gradient, rank=rank, momentum_rank=momentum_rank)
    basis = torch.nn.functional.normalize(update.left, dim=0)
    seen = basis @ (basis.mT @ gradient)
    kept, best = state["P"] @ state["R"].mT, best_approximation(seen, momentum_rank)
    # Never better than the best; two power steps at a ratio of 0.5 between singular values leave 0.5^4 of an angle, squared.
    assert (seen - best).norm() * (1 - 1e-9) <= (seen - kept).norm() < 1.05 * (seen - best).norm()


def test_following_a_fixed_gradient_finds_its_leading_directions():
    shape, k = (24, 16), 3
    (gradient,) = random_gradients(shape, 1, decay=0.7)
    leading = torch.linalg.svd(gradient, full_matrices=False).U[:, :k]
    rule, weight, cosines = LowRankPolar(), torch.zeros(shape, dtype=torch.float64), {}
    for count in (1, 40):
        state = first_state(rule, shape, momentum_rank=k)
        _, state = descend(rule, state, [gradient] * count, weight=weight, lr=0.1, rank=6, momentum_rank=k)
        cosines[count] = same_space(state["P"], leading).min()
    # One step leaves the third direction at 0.91; what was kept helps each later one, slowly at a decay of 0.7.
    assert cosines[1] < 0.95 and cosines[40] > 0.999


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_of_low_rank_is_kept_whole(shape, dtype):
    k, beta = 3, 0.9
    left, right = torch.randn(shape[0], k, dtype=dtype), torch.randn(shape[1], k, dtype=dtype)
    gradients = [(left * torch.tensor([4.0, 2.0, 1.0], dtype=dtype)) @ right.mT * (1 + 0.1 * step) for step in range(4)]
    rule = LowRankPolar()
    state = first_state(rule, shape, dtype, momentum_rank=k)
    common = {"weight": torch.zeros(shape, dtype=dtype), "lr": 0.1, "rank": 6, "momentum_rank": k, "beta": beta}
    _, state = descend(rule, state, gradients, **common)
    expected = sum(beta ** (3 - step) * gradient.double() for step, gradient in enumerate(gradients))
    momentum = (state["P"] @ state["R"].mT).double()
    # Shifts of 1e-6 in the Cholesky passes, rounding of 1e-7 in float32.
    assert torch.linalg.norm(momentum - expected) < 1e-3 * expected.norm()
    assert same_space(state["P"].double(), leading_directions(expected.mT)[0][:, :k]).min() > 1 - 1e-4
    assert same_space(state["R"].double(), leading_directions(expected)[0][:, :k]).min() > 1 - 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("residual", [0.25, 1.0])
def test_the_residual_lies_outside_the_basis_with_its_frobenius_norm(shape, residual):
    (gradient,) = random_gradients(shape, 1)
    update, _ = one_update(LowRankPolar(residual=residual), gradient, rank=4)
    expected = residual * update_scale(shape, 4, residual) * (min(shape) - 4) ** 0.5
    # The length is set in the last multiplication: a few roundings.
    rest = residual_of(update)
    torch.testing.assert_close(float(rest.norm()), expected, rtol=1e-12, atol=0)
    # Scaling rows turns columns a little into the basis: mostly outside is what is meant by spread.
    assert (update.left.mT @ rest).norm() < 0.5 * rest.norm()


def test_there_is_no_residual_at_full_rank_without_weight_or_for_a_sketch():
    (gradient,) = random_gradients((12, 8), 1)
    assert one_update(LowRankPolar(), gradient, rank=8)[0].dense is None
    assert one_update(LowRankPolar(residual=0), gradient, rank=4)[0].dense is None
    rule = LowRankPolar()
    state, q = first_state(rule, (12, 8)), torch.linalg.qr(gradient).Q
    sketches = (Sketched.of(Dense(gradient), q[:8, :4]), rule.sketch(Dense(gradient), state, context()))
    assert all(rule.update(sketch, state, context())[0].dense is None for sketch in sketches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_errors_are_no_residual(dtype):
    gradient = torch.randn(20, 3, dtype=dtype) @ torch.randn(3, 16, dtype=dtype)
    update, _ = one_update(LowRankPolar(), gradient, rank=5)
    assert torch.count_nonzero(residual_of(update)) == 0


def test_a_zero_gradient_gives_a_zero_update_while_momentum_is_kept():
    rule, shape = LowRankPolar(), (12, 8)
    (gradient,) = random_gradients(shape, 1)
    _, state = one_update(rule, gradient, rank=4)
    update, after = rule.update(Dense(torch.zeros_like(gradient)), state, context(step=2, beta=0.5))
    assert torch.count_nonzero(update.direction()) == 0
    torch.testing.assert_close(after["P"] @ after["R"].mT, 0.5 * state["P"] @ state["R"].mT, **TIGHT)


@pytest.mark.parametrize("rank", [1, 13, 60, 120])
@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0, 2.0])
def test_every_update_has_a_root_mean_square_of_about_two(rank, residual):
    gradient = torch.randn(120, 200, dtype=torch.float64)
    update, state = one_update(LowRankPolar(residual=residual), gradient, rank=rank, momentum_rank=0)
    change = update.direction()
    # Five Newton-Schulz steps leave singular values between 0.69 and 1.2; one value alone may lie anywhere there.
    assert 0.69 < change.square().mean().sqrt() / 2 < 1.2
    assert state == {}


def test_the_same_random_numbers_give_the_same_update_whether_a_zero_momentum_is_kept_or_none():
    (gradient,) = random_gradients((12, 9), 1)
    (one, _), (other, _) = (one_update(LowRankPolar(), gradient, rank=4, momentum_rank=k) for k in (0, 3))
    torch.testing.assert_close(one.direction(), other.direction(), **TIGHT)


def test_with_a_momentum_decay_of_zero_the_state_is_about_the_gradients_best_approximation():
    rule, shape = LowRankPolar(), (12, 8)
    first, second = random_gradients(shape, 2, decay=0.4)
    weight = torch.zeros(shape, dtype=torch.float64)
    state = first_state(rule, shape, rank=8)
    _, state = descend(rule, state, [first, second], weight=weight, lr=0.1, rank=8, momentum_rank=2, beta=0.0)
    error, best = (second - one for one in (state["P"] @ state["R"].mT, best_approximation(second, 2)))
    # Two power steps at a ratio of 0.4 between singular values.
    assert best.norm() * (1 - 1e-9) <= error.norm() < 1.02 * best.norm()


@pytest.mark.parametrize("residual", [-0.1, float("nan"), float("inf"), True, "half"])
def test_options_out_of_range_are_errors(residual):
    with pytest.raises(ArgumentError, match="residual"):
        LowRankPolar(residual=residual)

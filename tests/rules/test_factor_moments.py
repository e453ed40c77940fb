"""FactorMoments against its float64 reference; signs of singular vectors are fixed to the package's."""

import numpy as np
import pytest
import torch
from reference.factor_moments import FactorMomentsReference
from rules.driving import context, descend, first_state, random_gradients, standard_normals
from torch import nn

import gradlr
from gradlr import ArgumentError
from gradlr.gradient import Dense
from gradlr.linalg import svd_lowrank
from gradlr.rules import FactorMoments
from gradlr.tensors import mixed_seed

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (16, 16)}
COUNT = 20
# float64, 20 steps: 1e-16 of rounding, divided by the gaps between singular values and grown by 3.4445 ** 5 in the
# Newton-Schulz steps.
TIGHT = {"rtol": 0.0, "atol": 1e-9}


def exact(**options):
    return FactorMoments(newton_schulz_dtype=torch.float64, **options)


def signs_of(gradient, rank, generator):
    """An `align` for the reference: the package's signs, nothing else."""
    u, _, _ = svd_lowrank(gradient, rank, generator=generator)

    def align(left, right):
        signs = np.sign((left * u.numpy()).sum(axis=0))
        return left * signs, right * signs

    return align


def reference_for(weight, rule, *, rank, lr, beta, weight_decay=0.0):
    scale = rule.scale
    return FactorMomentsReference(
        weight.numpy(), rank=rank, lr=lr, beta=beta, beta2=rule.beta2, eps=rule.eps, scale=scale, weight_decay=weight_decay,
        adjust=rule.is_adjusted,
    )  # fmt: skip


def follow(reference, gradient, rank, generators):
    drawn = torch.randn(min(gradient.shape), rank, dtype=torch.float64, generator=generators())
    reference.step(gradient.numpy(), drawn.numpy(), rank=rank, align=signs_of(gradient, rank, generators()))
    return torch.from_numpy(reference.weight)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("decay", [1.0, 0.6])
@pytest.mark.parametrize("is_adjusted", [False, True])
@pytest.mark.parametrize("ranks", [[4] * COUNT, [4] * 5 + [2] * 5 + [8] * 5 + [6] * 5], ids=["fixed", "changing"])
@pytest.mark.parametrize(("scale", "weight_decay"), [(1.4, 0.1), (1.0, 0.0)])
def test_twenty_steps_are_the_references(shape, decay, is_adjusted, ranks, scale, weight_decay):
    rule, common = exact(is_adjusted=is_adjusted, scale=scale), {"lr": 0.05, "beta": 0.9, "weight_decay": weight_decay}
    weight, gradients = torch.randn(shape, dtype=torch.float64), random_gradients(shape, COUNT, decay=decay)
    weights, _ = descend(rule, first_state(rule, shape), gradients, weight=weight, ranks=ranks, **common)
    reference = reference_for(weight, rule, rank=ranks[0], **common)
    for step, (gradient, rank, found) in enumerate(zip(gradients, ranks, weights, strict=True), start=1):
        expected = follow(reference, gradient, rank, lambda step=step: context(step=step).generator)
        torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("is_adjusted", [False, True])
def test_twenty_steps_of_the_optimizer_are_the_references(shape, is_adjusted):
    model = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64)
    tracker, rule = gradlr.LossTracker(), exact(is_adjusted=is_adjusted, scale=1.3)
    options = {"lr": 0.05, "beta": 0.8, "weight_decay": 0.1}
    opt = gradlr.attach(model, tracker, rule=rule, rank=gradlr.ByLoss(8), seed=3, **options)
    reference = reference_for(model.weight.detach(), rule, rank=8, **options)
    ranks = []
    for step, gradient in enumerate(random_gradients(shape, COUNT), start=1):
        tracker(1.0 if step == 1 else 0.5 + 0.5 * (step % 3) / 3)
        ranks.append(opt.records[0].rank)
        opt.receive(model.weight, Dense(gradient))
        expected = follow(reference, gradient, ranks[-1], lambda step=step: torch.Generator().manual_seed(mixed_seed(3, 0, step)))
        torch.testing.assert_close(model.weight.detach(), expected, **TIGHT)
    assert len(set(ranks)) > 2


@pytest.mark.parametrize("shape", [(3, 12, 9), (3, 9, 12)])
@pytest.mark.parametrize("is_adjusted", [False, True])
def test_a_batch_is_a_loop_over_it(shape, is_adjusted):
    # svd_lowrank shares one test matrix over the batch: each matrix alone draws the same numbers.
    rule, gradients, weight = exact(is_adjusted=is_adjusted), random_gradients(shape, 6), torch.randn(shape, dtype=torch.float64)
    found = descend(rule, first_state(rule, shape), gradients, weight=weight, lr=0.1)[0][-1]
    for index in range(3):
        single = [gradient[index] for gradient in gradients]
        alone = descend(rule, first_state(rule, shape[1:]), single, weight=weight[index], lr=0.1)[0][-1]
        torch.testing.assert_close(found[index], alone, **TIGHT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bfloat16_newton_schulz_steps_stay_near_the_float64_ones(shape):
    gradients, weight = random_gradients(shape, 5), torch.zeros(shape, dtype=torch.float64)
    found, expected = (
        descend(rule, first_state(rule, shape), gradients, weight=weight, lr=0.1)[0][-1] for rule in (FactorMoments(), exact())
    )
    # 2^-8 per operation, about fifteen in a row that partly amplify.
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_the_first_update_is_the_polar_factor_up_to_newton_schulz():
    (gradient,) = random_gradients((12, 8), 1)
    rule = exact(scale=1.0)
    update, state = rule.update(Dense(gradient), first_state(rule, (12, 8), rank=8), context(8))
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    inner = u.mT @ update.left @ update.right.mT @ vh.mT
    # Equal singular values of the means, hence one factor for all directions; Newton-Schulz puts each side in 0.7 to 1.2.
    factor = inner.diagonal().mean()
    assert 0.7**2 < factor < 1.2**2
    torch.testing.assert_close(inner, factor * torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)
    assert {key: tuple(value.shape) for key, value in state.items()} == {"U": (12, 8), "V": (8, 8), "S": (8,), "S2": (8,)}


def test_the_default_scale_makes_the_notebooks_update_comparable_with_adamws():
    (gradient,) = random_gradients((20, 10), 1)
    one, other = (
        rule.update(Dense(gradient), first_state(rule, (20, 10)), context())[0].left for rule in (exact(), exact(scale=1.0))
    )
    # One multiplication: 2 √(mn / r).
    torch.testing.assert_close(one, 2 * (20 * 10 / 4) ** 0.5 * other, rtol=1e-14, atol=0)


def test_adjusting_keeps_momentum_that_changing_signs_would_cancel():
    # The same gradient again and again, through singular vectors whose signs the random numbers choose.
    (gradient,) = random_gradients((12, 8), 1, decay=0.5)
    lengths = {}
    for is_adjusted in (False, True):
        rule = exact(is_adjusted=is_adjusted)
        weight = torch.zeros(12, 8, dtype=torch.float64)
        _, state = descend(rule, first_state(rule, (12, 8), rank=8), [gradient] * 20, weight=weight, lr=0.1, rank=8)
        lengths[is_adjusted] = state["U"].norm(dim=0)
    # 1 - 0.9 ** 20 = 0.878 is what a mean of one and the same vector reaches; rotations in float64 lose nothing of it.
    torch.testing.assert_close(lengths[True], torch.full((8,), 1 - 0.9**20, dtype=torch.float64), rtol=1e-6, atol=0)
    assert (lengths[False] <= lengths[True] + 1e-9).all()


def test_standard_normals_are_those_of_svd_lowrank():
    (gradient,) = random_gradients((24, 10), 1)
    drawn = standard_normals((10, 4), step=2)
    basis = torch.linalg.qr(gradient @ drawn).Q
    u, _, _ = svd_lowrank(gradient, 4, power_steps=0, generator=context(step=2).generator)
    # Both bases span the same space.
    torch.testing.assert_close(basis @ (basis.mT @ u), u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"beta2": 1.0}, {"eps": -1.0}, {"scale": -1.0}, {"scale": float("nan")}], ids=str)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ArgumentError):
        FactorMoments(**options)

"""What every rule must do, whatever it computes: one table of rules, run over one table of shapes."""

import copy
import io

import pytest
import torch
from rules.driving import context
from shapes import matrix

from gradlr.engine.apply_update import apply_update
from gradlr.gradient import Dense, Sketched
from gradlr.layers import View
from gradlr.rules import Adam, FactorMoments, LowRankPolar, MultiNormalized, Polar, RowwiseRMSprop

CPU = torch.device("cpu")

TRACKED = {
    "tracked": LowRankPolar(),
    "tracked_no_residual": LowRankPolar(residual=0),
}
FACTORS = {
    "factors": FactorMoments(),
    "factors_adjusted": FactorMoments(is_adjusted=True),
    "factors_notebook": FactorMoments(scale=1.0),
}
MATRIX_RULES = TRACKED | FACTORS
FULL_WIDTH = {"multi_normalized": MultiNormalized(), "polar": Polar()}
RULES = MATRIX_RULES | FULL_WIDTH | {"adam": Adam(), "rowwise": RowwiseRMSprop()}

FULL_RANK_SHAPES = ("tall", "wide", "square", "batched", "one_row", "one_column")
MATRIX_SHAPES = (*FULL_RANK_SHAPES, "deficient", "zero")
WIDE_ENOUGH_SHAPES = ("tall", "wide", "square", "batched")  # both sides hold at least 8
VECTOR_SHAPES = ("vector", "scalar")
DTYPES = (torch.float32, torch.float64)


def shapes_of(rule, shapes=MATRIX_SHAPES):
    return VECTOR_SHAPES if rule == "adam" else shapes


def over(rules, shapes=MATRIX_SHAPES):
    pairs = [(rule, shape) for rule in rules for shape in shapes_of(rule, shapes)]
    parametrize = pytest.mark.parametrize(("rule", "shape"), pairs, ids=["-".join(pair) for pair in pairs])
    return lambda test: pytest.mark.sampled(parametrize(test))


def gradient_of(shape, dtype=torch.float64, seed=0):
    if shape in VECTOR_SHAPES:
        vector = matrix("one_row", dtype, seed)[0]
        return vector if shape == "vector" else vector[0]
    return matrix(shape, dtype, seed)


def settings_for(gradient, *, step=1, rank=4, momentum_rank=2, seed=0):
    limit = min(gradient.shape[-2:]) if gradient.ndim >= 2 else 1
    return context(min(rank, limit), min(momentum_rank, limit), step=step, seed=seed)


def fresh_state(rule, gradient, dtype=None, **options):
    return rule.init(gradient.shape, settings_for(gradient, **options), dtype=dtype or gradient.dtype, device=CPU)


def run(rule, gradients, *, seed=0, **options):
    """The last update and the last state after one update per gradient, from a fresh state."""
    state = fresh_state(rule, gradients[0], **options)
    for step, gradient in enumerate(gradients, start=1):
        update, state = rule.update(Dense(gradient), state, settings_for(gradient, step=step, seed=seed, **options))
    return update, state


def several(shape, dtype=torch.float64, count=3):
    return [gradient_of(shape, dtype, seed) for seed in range(count)]


def parts(update):
    return {key: part for key, part in vars(update).items() if key not in ("rows", "check") and part is not None}


def equal_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def relative_difference(found, expected):
    return float((found - expected).norm() / expected.norm())


# -- types and shapes --------------------------------------------------------------------------------------------------


@over(RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_and_state_have_the_dtype_of_the_state_and_are_finite(rule, shape, dtype):
    update, state = run(RULES[rule], several(shape, dtype))
    assert all(part.dtype == dtype and part.isfinite().all() for part in parts(update).values())
    for key, value in state.items():
        assert value.dtype == dtype and value.isfinite().all(), key


@over(RULES)
def test_a_half_precision_gradient_gives_a_float32_update(rule, shape):
    gradient = gradient_of(shape, torch.float32).bfloat16()
    state = fresh_state(RULES[rule], gradient, torch.float32)
    update, state = RULES[rule].update(Dense(gradient), state, settings_for(gradient))
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in parts(update).values())
    assert all(value.dtype == torch.float32 for value in state.values())


@over(RULES)
def test_the_state_keeps_its_keys_and_shapes(rule, shape):
    before = fresh_state(RULES[rule], gradient_of(shape))
    _, after = run(RULES[rule], several(shape))
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}


@over(RULES)
def test_the_update_has_the_shape_of_the_parameter(rule, shape):
    gradient = gradient_of(shape)
    update, _ = run(RULES[rule], [gradient])
    assert parts(update)
    if update.left is not None:
        rank = settings_for(gradient).rank
        assert update.left.shape == (*gradient.shape[:-1], rank)
        assert update.right.shape == (*gradient.shape[:-2], gradient.shape[-1], rank)
    if update.dense is not None:
        assert update.dense.shape == gradient.shape


@over(MATRIX_RULES)
@pytest.mark.parametrize("rank", [2, 3, 6])
def test_the_low_rank_part_has_at_most_the_asked_rank(rule, shape, rank):
    gradients = several(shape)
    update, _ = run(RULES[rule], gradients, rank=rank)
    product = update.left @ update.right.mT
    asked = settings_for(gradients[0], rank=rank).rank
    # Rounding in float64 leaves about 1e-15 of the largest singular value in the other directions.
    assert (torch.linalg.matrix_rank(product, rtol=1e-12) <= asked).all()


# -- zero, scale, range ------------------------------------------------------------------------------------------------


@over(RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_gradient_gives_a_zero_update_from_a_fresh_state(rule, shape, dtype):
    update, state = run(RULES[rule], [torch.zeros_like(gradient_of(shape, dtype))])
    assert torch.count_nonzero(update.direction()) == 0
    assert all(value.isfinite().all() for value in state.values())


@over(RULES)
def test_a_nonzero_gradient_gives_a_nonzero_update(rule, shape):
    update, _ = run(RULES[rule], [gradient_of(shape)])
    assert bool(update.direction().any()) == (shape != "zero")


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_a_zero_matrix_in_a_batch_gets_a_zero_update_and_does_not_touch_the_others(rule):
    whole = gradient_of("batched")
    holed = whole.clone()
    holed[1] = 0
    found, expected = (run(RULES[rule], [gradient])[0].direction() for gradient in (holed, whole))
    assert torch.count_nonzero(found[1]) == 0
    # The same arithmetic per matrix; batched kernels may still order sums otherwise.
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-9, atol=1e-9)


@over(RULES, FULL_RANK_SHAPES)
@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
@pytest.mark.parametrize("count", [1, 4])
def test_scaling_all_gradients_leaves_the_direction(rule, shape, scale, count):
    # About 1e-3 and 1e3; powers of two, so that bfloat16 Newton-Schulz steps see the same digits.
    gradients = several(shape, count=count)
    plain, _ = run(RULES[rule], gradients)
    scaled, _ = run(RULES[rule], [gradient * scale for gradient in gradients])
    # eps = 1e-8 and Newton-Schulz' 1e-7 stand beside numbers of 1e-4 and more.
    assert relative_difference(scaled.direction(), plain.direction()) < 2e-3


@pytest.mark.parametrize("scale", [1e15, 1e-30])
@over(RULES, FULL_RANK_SHAPES)
def test_huge_and_tiny_gradients_stay_finite_and_move_the_weight(rule, shape, scale):
    # 1e15: float32 holds squares of up to 1e38. 1e-30: eps = 1e-8 makes it vanish for some rules, but not to zero.
    update, state = run(RULES[rule], [gradient * scale for gradient in several(shape, torch.float32)])
    assert all(value.isfinite().all() for value in (*parts(update).values(), *state.values()))
    assert 0 < update.direction().norm() < 100


@over(TRACKED, FULL_RANK_SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_low_rank_polar_goes_the_same_way_for_1e30_and_1e_minus_30_as_for_1(rule, shape, scale):
    gradients = several(shape, torch.float32)
    plain, _ = run(RULES[rule], gradients)
    scaled, _ = run(RULES[rule], [gradient * scale for gradient in gradients])
    # float32 rounding, 1e-7, amplified by the worst conditioned of these small matrices.
    assert relative_difference(scaled.direction(), plain.direction()) < 1e-2


# -- purity ------------------------------------------------------------------------------------------------------------


@over(RULES)
def test_the_state_and_the_gradient_passed_in_are_not_modified(rule, shape):
    gradients = several(shape, count=2)
    _, state = run(RULES[rule], gradients[:1])
    old_state, old_gradient = copy.deepcopy(state), gradients[1].clone()
    RULES[rule].update(Dense(gradients[1]), state, settings_for(gradients[1], step=2))
    assert equal_bits(state, old_state)
    assert torch.equal(gradients[1], old_gradient)


@over(RULES)
def test_writing_an_update_leaves_the_new_state(rule, shape):
    gradient = gradient_of(shape)
    update, state = run(RULES[rule], [gradient])
    kept = copy.deepcopy(state)
    apply_update(torch.ones_like(gradient), View(), update, lr=0.1, weight_decay=0.1, generator=context().generator)
    assert equal_bits(state, kept)


@over(RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_generator_seed_gives_the_same_bits_and_leaves_torchs_own_numbers_alone(rule, shape, dtype):
    gradients = several(shape, dtype)
    first, first_state = run(RULES[rule], gradients, seed=5)
    torch.rand(1)
    after = torch.random.get_rng_state()
    second, second_state = run(RULES[rule], gradients, seed=5)
    assert equal_bits(parts(first), parts(second)) and equal_bits(first_state, second_state)
    assert torch.equal(torch.random.get_rng_state(), after)


@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_other_random_numbers_give_another_update_where_the_rank_is_cut(rule):
    gradient = gradient_of("square")
    one, other = (run(RULES[rule], [gradient], seed=seed)[0].direction() for seed in (1, 2))
    assert relative_difference(one, other) > 1e-2


@over(RULES)
def test_a_saved_and_loaded_state_goes_on_bit_by_bit(rule, shape):
    gradients = several(shape)
    _, state = run(RULES[rule], gradients[:2])
    assert type(state) is dict and all(type(value) is torch.Tensor for value in state.values())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert equal_bits(loaded, state)
    going_on = [RULES[rule].update(Dense(gradients[2]), one, settings_for(gradients[2], step=3)) for one in (state, loaded)]
    assert equal_bits(parts(going_on[0][0]), parts(going_on[1][0])) and equal_bits(going_on[0][1], going_on[1][1])


@over(RULES)
def test_the_state_holds_no_more_memory_than_its_numbers(rule, shape):
    _, state = run(RULES[rule], several(shape))
    for key, value in state.items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key


# -- rank --------------------------------------------------------------------------------------------------------------


@over(MATRIX_RULES, WIDE_ENOUGH_SHAPES)
def test_the_rank_may_fall_and_grow_between_updates(rule, shape):
    gradients = several(shape)
    state = fresh_state(RULES[rule], gradients[0], rank=8)
    for step, (rank, gradient) in enumerate(zip((4, 2, 8), gradients, strict=True), start=1):
        update, state = RULES[rule].update(Dense(gradient), state, settings_for(gradient, rank=rank, step=step))
        assert update.left.shape[-1] == update.right.shape[-1] == rank
        assert all(value.isfinite().all() for value in (*parts(update).values(), *state.values()))
        # At least a tenth of, and no more than ten times, the length sqrt(mn) of an update with a root mean square of one.
        length = rank**0.5 if rule == "factors_notebook" else (gradient.shape[-2] * gradient.shape[-1]) ** 0.5
        lengths = torch.linalg.matrix_norm(update.left @ update.right.mT)
        assert (lengths > length / 10).all() and (lengths < length * 10).all()


@over(FACTORS, WIDE_ENOUGH_SHAPES)
def test_factor_moments_take_a_rank_above_their_states(rule, shape):
    gradients = several(shape, count=2)
    _, state = run(RULES[rule], gradients[:1], rank=4)
    update, state = RULES[rule].update(Dense(gradients[1]), state, settings_for(gradients[1], rank=8, step=2))
    assert update.left.shape[-1] == state["S"].shape[-1] == state["V"].shape[-1] == 8
    assert update.direction().isfinite().all()


@pytest.mark.parametrize("rule", TRACKED)
def test_a_rank_below_the_momentum_rank_truncates_update_and_momentum(rule):
    gradient = gradient_of("tall")
    _, state = run(RULES[rule], [gradient], rank=6, momentum_rank=4)
    update, after = RULES[rule].update(Dense(gradient), state, settings_for(gradient, rank=2, momentum_rank=4, step=2))
    assert update.left.shape[-1] == 2
    assert after["P"].shape[-1] == 4
    assert torch.linalg.matrix_rank(after["P"] @ after["R"].mT, rtol=1e-12) == 2


@over(RULES)
@pytest.mark.parametrize(("rank", "momentum_rank"), [(3, 1), (6, 4), (4, 2)])
def test_resize_gives_the_shapes_of_a_fresh_state_and_keeps_the_leading_columns(rule, shape, rank, momentum_rank):
    gradient = gradient_of(shape)
    _, state = run(RULES[rule], [gradient])
    old = copy.deepcopy(state)
    wanted = settings_for(gradient, rank=rank, momentum_rank=momentum_rank)
    resized = RULES[rule].resize(state, gradient.shape, wanted)
    expected = RULES[rule].init(gradient.shape, wanted, dtype=torch.float64, device=CPU)
    assert equal_bits(state, old)
    assert resized.keys() == state.keys()
    for key, value in resized.items():
        assert value.shape == expected[key].shape, key
        old_value, value = torch.atleast_1d(old[key]), torch.atleast_1d(value)
        kept = min(value.shape[-1], old_value.shape[-1])
        assert torch.equal(value[..., :kept], old_value[..., :kept])
        assert torch.count_nonzero(value[..., kept:]) == 0


@over(MATRIX_RULES, WIDE_ENOUGH_SHAPES)
@pytest.mark.parametrize(("rank", "momentum_rank"), [(2, 1), (8, 5)])
def test_a_resized_state_goes_on_with_updates_of_the_same_length(rule, shape, rank, momentum_rank):
    gradients = several(shape)
    _, state = run(RULES[rule], gradients[:2])
    now = settings_for(gradients[2], rank=rank, momentum_rank=momentum_rank, step=3)
    state = RULES[rule].resize(state, gradients[2].shape, now)
    update, _ = RULES[rule].update(Dense(gradients[2]), state, now)
    length = rank**0.5 if rule == "factors_notebook" else (gradients[2].shape[-2] * gradients[2].shape[-1]) ** 0.5
    # Every rule's singular values are about one; ten times that is no longer the same update.
    assert (torch.linalg.matrix_norm(update.left @ update.right.mT) < 10 * length).all()


# -- sketches ----------------------------------------------------------------------------------------------------------


def random_bases(gradient, columns):
    generator = torch.Generator().manual_seed(3)
    *batch, m, n = gradient.shape
    right, left = (torch.randn((*batch, rows, columns), dtype=gradient.dtype, generator=generator) for rows in (n, m))
    return torch.linalg.qr(right).Q, torch.linalg.qr(left).Q


@over(MATRIX_RULES)
@pytest.mark.parametrize("is_two_sided", [True, False])
def test_a_rule_works_through_a_sketch_in_any_bases(rule, shape, is_two_sided):
    gradients = several(shape)
    now = settings_for(gradients[0])
    right, left = random_bases(gradients[0], now.rank)
    state = fresh_state(RULES[rule], gradients[0])
    for step, gradient in enumerate(gradients, start=1):
        sketched = Sketched.of(Dense(gradient), right, left if is_two_sided else None)
        update, state = RULES[rule].update(sketched, state, settings_for(gradient, step=step))
    assert update.dense is None
    assert update.left.shape == (*gradient.shape[:-1], now.rank)
    assert all(value.isfinite().all() for value in (*parts(update).values(), *state.values()))
    assert bool(update.direction().any()) == (shape != "zero")


@over(MATRIX_RULES)
@pytest.mark.parametrize("count", [0, 2])
def test_a_sketch_has_orthonormal_or_zero_bases_of_the_right_shapes(rule, shape, count):
    gradients = several(shape)
    state = run(RULES[rule], gradients[:count])[1] if count else fresh_state(RULES[rule], gradients[0])
    now = settings_for(gradients[2], step=3)
    sketch = RULES[rule].sketch(Dense(gradients[2]), state, now)
    assert sketch.shape == gradients[2].shape
    assert sketch.right.shape[-1] == now.rank and sketch.left.shape[-1] >= now.rank
    for basis in (sketch.right, sketch.left):
        gram = basis.mT @ basis
        lengths = gram.diagonal(dim1=-2, dim2=-1)
        # The shift of 1e-13 in the last Cholesky pass is left over, more in columns that depend on others.
        assert ((lengths - 1).abs().lt(1e-4) | (lengths == 0)).all()
        # The notebook rule's svd_lowrank takes what is left of dependent columns for a direction, but never two alike.
        assert (gram - torch.diag_embed(lengths)).abs().max() < 1e-4


@over(["tracked_no_residual"])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("rank", [3, 6])
def test_the_update_from_low_rank_polars_own_sketch_is_the_dense_one(rule, shape, count, rank):
    gradients = several(shape)
    state = run(RULES[rule], gradients[:count], rank=rank)[1] if count else fresh_state(RULES[rule], gradients[0], rank=rank)
    gradient = gradients[2]

    def now():
        return settings_for(gradient, rank=rank, step=3)

    sketch = RULES[rule].sketch(Dense(gradient), state, now())
    found, found_state = RULES[rule].update(sketch, state, now())
    expected, expected_state = RULES[rule].update(Dense(gradient), state, now())
    low_rank = expected.left @ expected.right.mT
    # Shifts of 1e-13 and rounding, amplified where directions are all but null.
    tolerance = 1e-3
    assert torch.linalg.norm(found.direction() - low_rank) <= tolerance * low_rank.norm()
    momentum, expected_momentum = (one["P"] @ one["R"].mT for one in (found_state, expected_state))
    assert torch.linalg.norm(momentum - expected_momentum) <= tolerance * expected_momentum.norm()


@over(MATRIX_RULES, FULL_RANK_SHAPES)
def test_at_full_rank_the_update_from_the_own_sketch_is_the_dense_one(rule, shape):
    gradient = gradient_of(shape)
    rank = min(gradient.shape[-2:])
    state = fresh_state(RULES[rule], gradient, rank=rank)
    sketch = RULES[rule].sketch(Dense(gradient), state, settings_for(gradient, rank=rank))
    found, _ = RULES[rule].update(sketch, state, settings_for(gradient, rank=rank))
    expected, _ = RULES[rule].update(Dense(gradient), state, settings_for(gradient, rank=rank))
    # Signs of singular vectors cancel in the product. bfloat16 (2^-8) in the Newton-Schulz steps of the factor rules sees the
    # last bits of differently rounded input; tracked momentum has shifts of 1e-13, and 1e-7 beside a norm in another basis.
    tolerance = 1e-6 if rule in TRACKED else 0.05
    assert relative_difference(found.direction(), expected.direction()) < tolerance


@over(MATRIX_RULES, FULL_RANK_SHAPES)
def test_sketches_in_one_basis_add(rule, shape):
    first, second = several(shape, count=2)
    state = fresh_state(RULES[rule], first)
    sketch = RULES[rule].sketch(Dense(first), state, settings_for(first))
    whole = Sketched.of(Dense(first + second), sketch.right, sketch.left)
    sketch.add_(Dense(second))
    # Linear in the gradient: rounding of a few float64 sums only.
    torch.testing.assert_close(sketch.right_sketch, whole.right_sketch, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sketch.left_sketch, whole.left_sketch, rtol=1e-12, atol=1e-12)


@over(MATRIX_RULES)
def test_a_sketch_modifies_neither_state_nor_gradient(rule, shape):
    gradients = several(shape, count=2)
    _, state = run(RULES[rule], gradients[:1])
    old_state, old_gradient = copy.deepcopy(state), gradients[1].clone()
    RULES[rule].sketch(Dense(gradients[1]), state, settings_for(gradients[1], step=2)).add_(Dense(gradients[1]))
    assert equal_bits(state, old_state)
    assert torch.equal(gradients[1], old_gradient)


@over(MATRIX_RULES)
def test_bases_known_before_the_gradient_are_orthonormal(rule, shape):
    """Of state and seed alone, as several processes make them."""
    rule, gradient = MATRIX_RULES[rule], gradient_of(shape)
    state = fresh_state(rule, gradient)
    _, state = rule.update(Dense(gradient.clone()), state, settings_for(gradient))

    def basis():
        return rule.right_basis(gradient.shape, state, settings_for(gradient, step=2), dtype=torch.float64, device=CPU)

    right, rank = basis(), settings_for(gradient).rank
    assert right.shape[-2:] == (gradient.shape[-1], rank)
    identity = torch.eye(rank, dtype=torch.float64).expand(*right.shape[:-2], -1, -1)
    # Rounding of float64 in a factorization of a few columns.
    torch.testing.assert_close(right.mT @ right, identity, rtol=0, atol=1e-12)
    assert torch.equal(right, basis())

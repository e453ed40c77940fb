"""The kernels against the plain ways that they stand in for: the very kernels, run by Triton's interpreter on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import attached, mlp

from gradlr import tensors
from gradlr.engine.apply_update import apply_update
from gradlr.gradient import RowsOnDemand
from gradlr.layers import AS_IT_IS
from gradlr.linalg import kernels, normalize
from gradlr.linalg.normalize import frobenius_norm, spread_scales
from gradlr.rules import Update

pytest.importorskip("triton", reason="Triton is for Linux on x86")

# Sums of a few hundred float32 numbers in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def with_kernels(monkeypatch):
    """CPU tensors take the kernels, as a GPU's do."""
    traits = tensors.DeviceTraits(is_async=True, widest_float=torch.float64, has_half_products=True, has_kernels=True)

    def switch(is_on=True):
        monkeypatch.setitem(tensors._OVERRIDES, "cpu", traits if is_on else tensors._SYNCHRONOUS)

    return switch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (40, 300), (70, 33), (2, 3, 17, 20)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e15, 1e-25])
def test_scales_are_those_of_the_plain_way(with_kernels, dtype, shape, scale):
    x = (torch.randn(shape) * torch.rand(shape[-1]) * scale).to(dtype)
    x[..., 1, :] = 0
    x[..., :, 2] = 0
    norm = frobenius_norm(x) * 1.5
    plain = spread_scales(x, norm, 3.0, 1e-6)
    with_kernels()
    found = spread_scales(x, norm, 3.0, 1e-6)
    for one, other in zip(found, plain, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one * norm, other * norm, **CLOSE)
    size = torch.linalg.vector_norm(x.double() * found[0] * found[1], dim=(-2, -1))
    torch.testing.assert_close(size, torch.full_like(size, 3.0), rtol=1e-5, atol=0)


def test_strides_do_not_matter_and_the_order_of_sums_is_always_the_same(with_kernels):
    with_kernels()
    x = torch.randn(50, 40).mT
    norm = frobenius_norm(x)
    found, copied = spread_scales(x, norm, 1.0, 0.0), spread_scales(x.contiguous(), norm, 1.0, 0.0)
    assert all(torch.equal(one, other) for one, other in zip(found, copied, strict=True))


def test_a_matrix_of_rounding_errors_is_not_spread(with_kernels):
    with_kernels()
    rows, columns = spread_scales(1e-4 * torch.randn(20, 30), torch.ones(1, 1), 1.0, 0.1)
    assert not rows.any() and columns.any()


PARTS = {
    "low_rank": {"left", "right"},
    "low_rank_scaled": {"left", "right", "row_scale"},
    "dense": {"dense"},
    "dense_scaled": {"dense", "dense_rows", "dense_columns"},
    "both": {"left", "right", "dense", "dense_rows", "dense_columns"},
    "nothing": set(),
}


def update_of(parts, shape, dtype=torch.float32):
    *batch, m, n = shape
    sizes = {"left": (m, 9), "right": (n, 9), "row_scale": (m, 1), "dense": (m, n), "dense_rows": (m, 1), "dense_columns": (1, n)}
    made = {key: torch.randn(*batch, *sizes[key]) for key in sorted(parts)}
    if "dense" in made:
        made["dense"] = made["dense"].to(dtype)
    return made


@pytest.mark.parametrize("shape", [(7, 5), (130, 70), (2, 3, 20, 66)], ids=str)
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_a_weight_is_written_as_in_the_plain_way(with_kernels, shape, parts, weight_decay):
    weight, made = torch.randn(shape), update_of(parts, shape)
    expected = weight.double() * (1 - 0.01 * weight_decay) - 0.01 * Update(**made).direction().double()
    with_kernels()
    version = weight._version
    apply_update(weight, AS_IT_IS, Update(**made), lr=0.01, weight_decay=weight_decay, generator=None)
    torch.testing.assert_close(weight.double(), expected, **CLOSE)
    assert weight._version > version  # autograd must see that a weight which a graph needs has changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_in_half_precision_are_taken_as_they_are(with_kernels, dtype):
    """As those of a head: scaled only once they are multiplied, since that would round them."""
    weight = torch.randn(70, 40).to(dtype)
    made = {"left": torch.randn(70, 9).bfloat16(), "right": torch.randn(40, 9).bfloat16(), "row_scale": torch.rand(70, 1)}
    expected = weight.double() - 0.01 * Update(**made).direction().double()
    plain = weight.clone()
    for is_on, target in ((False, plain), (True, weight)):
        with_kernels(is_on)
        apply_update(target, AS_IT_IS, Update(**made), lr=0.01, weight_decay=0.0, generator=torch.Generator())
        gap = 0 if dtype == torch.float32 else 2.0 ** (torch.frexp(expected).exponent - 8)
        assert ((target.double() - expected).abs() <= 1.01 * gap + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("check", [float("nan"), float("inf"), -float("inf")])
def test_nothing_is_written_where_the_check_is_not_finite(with_kernels, dtype, check):
    with_kernels()
    weight, made = torch.randn(20, 30).to(dtype), update_of(PARTS["both"], (20, 30))
    before, generator = weight.clone(), torch.Generator()
    made["left"][:] = torch.nan
    apply_update(weight, AS_IT_IS, Update(**made), lr=0.01, weight_decay=0.5, generator=generator, check=torch.tensor(check))
    assert torch.equal(weight, before)


def test_bfloat16_is_rounded_to_a_neighbour_and_right_on_average(with_kernels):
    with_kernels()
    weight, change = torch.randn(300, 400).to(torch.bfloat16), torch.randn(300, 400) * 1e-3
    exact, generator = weight.double() - change.double(), torch.Generator().manual_seed(3)
    before = weight.clone()
    apply_update(weight, AS_IT_IS, Update(dense=change), lr=1.0, weight_decay=0.0, generator=generator)
    gap = 2.0 ** (torch.frexp(exact).exponent - 8)
    error = weight.double() - exact
    assert (error.abs() < 1.01 * gap).all()
    # Each error is at most a gap, of a variance of at most a quarter of its square: the mean of 120,000, within five of its
    # standard deviations.
    assert (error / gap).mean().abs() < 5 * 0.5 / 120_000**0.5
    again, generator = before.clone(), torch.Generator().manual_seed(3)
    apply_update(again, AS_IT_IS, Update(dense=change), lr=1.0, weight_decay=0.0, generator=generator)
    assert torch.equal(weight, again)
    apply_update(before, AS_IT_IS, Update(dense=change), lr=1.0, weight_decay=0.0, generator=generator.manual_seed(4))
    assert not torch.equal(weight, before)


def test_weights_that_are_not_finite_and_sums_beyond_the_largest_number(with_kernels):
    with_kernels()
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, 3.38e38, 0.0]]).to(torch.bfloat16)
    change = torch.tensor([[1.0, 1.0, 1.0, -1e36, 0.0]])
    apply_update(weight, AS_IT_IS, Update(dense=change), lr=1.0, weight_decay=0.0, generator=torch.Generator())
    assert weight[0, 0].isnan() and weight[0, 1] == torch.inf and weight[0, 2] == -torch.inf
    assert weight[0, 3] == torch.finfo(torch.bfloat16).max and weight[0, 4] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 700)], ids=str)
def test_adam_is_adam(dtype, shape):
    gradient = torch.randn(shape).to(dtype)
    mean, square = torch.randn(shape), torch.rand(shape)
    direction, new_mean, new_square = kernels.adam(gradient, mean, square, 0.9, 0.99, 0.5, 0.25, 1e-8)
    g = gradient.double()
    expected_mean, expected_square = 0.9 * mean.double() + 0.1 * g, 0.99 * square.double() + 0.01 * g * g
    torch.testing.assert_close(new_mean.double(), expected_mean, **CLOSE)
    torch.testing.assert_close(new_square.double(), expected_square, **CLOSE)
    expected = expected_mean / 0.5 / ((expected_square / 0.25).sqrt() + 1e-8)
    torch.testing.assert_close(direction.double(), expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"apply": "step", "max_grad_norm": 1.0}, {"capture": "adaptor"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:capture=.* costs more than hooks would")
def test_training_goes_as_without_kernels(with_kernels, options, dtype):
    losses = {}
    for is_on in (False, True):
        with_kernels(is_on)
        torch.manual_seed(0)
        model, tracker, opt = attached(mlp(dtype=dtype), lr=1e-2, rank=4, weight_decay=0.1, **options)
        x = torch.randn(32, 16, dtype=dtype)
        losses[is_on] = []
        for _ in range(5):
            loss = (model(x) - 1).square().mean()
            losses[is_on].append(loss.item())
            tracker(loss).backward()
            opt.step()
        opt.detach()
    assert losses[True][-1] < 0.8 * losses[True][0]
    # bfloat16 draws other directions, and rounds other products and weights.
    close = {"rel": 1e-3} if dtype == torch.float32 else {"rel": 0.05}
    assert losses[True] == pytest.approx(losses[False], **close)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gradlr.linalg import triton_kernels as kernels

NARROW = {"gradient", "x", "weight", "dense"}
SCALARS = {"beta", "beta2", "mean_weight", "square_weight", "eps", "tiny", "size", "threshold", "decay", "lr"}


def kind(name, integers):
    if name in NARROW:
        return "*bf16"
    if name in SCALARS:
        return "fp32"
    return "i64" if name == "seed" else "i32" if name in integers else "*fp32"


def compiled(kernel, target, **constants):
    integers = {"m", "n", "r", "count"} | {name for name in kernel.arg_names if name.startswith("stride_") or name[-2:-1] == "_"}
    signature = {name: "constexpr" if name in constants else kind(name, integers) for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constexprs=constants), target=target).asm["cubin"]


has_all = dict.fromkeys(("HAS_PRODUCT", "HAS_ROW_SCALE", "HAS_DENSE", "HAS_ROWS", "HAS_COLUMNS", "HAS_CHECK"), True)
for capability in (80, 90):
    target = GPUTarget("cuda", capability, 32)
    for is_first in (True, False):
        assert compiled(kernels._normalize_pass, target, IS_FIRST=is_first, ROWS=16, COLUMNS=256)
    assert compiled(kernels._scales, target, VECTOR=1024)
    assert compiled(kernels._adam, target, VECTOR=1024)
    assert compiled(kernels._subtract, target, **has_all, IS_NARROW=True, PRECISION="tf32", BLOCK=64, INNER=32)
"""


def test_they_compile_to_machine_code_of_two_generations_of_gpus(tmp_path):
    """No GPU is needed for that: Triton brings its own assembler."""
    script = tmp_path / "compiled.py"  # the sources of kernels are read from files
    script.write_text(COMPILED)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(Path(kernels.__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_kernel_is_asked_for_where_there_is_none(monkeypatch):
    monkeypatch.setattr(normalize.kernels, "normalize_pass", lambda *_: pytest.fail("a kernel on a CPU"))
    spread_scales(torch.randn(4, 5), torch.ones(1, 1), 1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_demand_are_written_as_in_the_plain_way(with_kernels, dtype, monkeypatch):
    """A block of rows to a kernel, with random numbers of its own."""
    monkeypatch.setattr("gradlr.engine.apply_update._KERNEL_NUMBERS", 64 * 33)
    weight, rows = torch.zeros(150, 33, dtype=dtype), torch.randn(150, 33)
    rows[64:128] = rows[:64]
    asked = []

    def make(place):
        asked.append(place)
        return rows[place].clone()

    with_kernels()
    update = Update(dense=RowsOnDemand(make, rows.shape))
    apply_update(weight, AS_IT_IS, update, lr=0.5, weight_decay=0.0, generator=torch.Generator())
    assert [place.start for place in asked] == [0, 64, 128]
    gap = 0 if dtype == torch.float32 else 2.0 ** (torch.frexp(0.5 * rows).exponent - 8)
    assert ((weight + 0.5 * rows).abs() <= 1.01 * gap + 1e-6).all()
    assert torch.equal(weight[:64], weight[64:128]) == (dtype == torch.float32)
    before = weight.clone()
    apply_update(weight, AS_IT_IS, update, lr=0.5, weight_decay=0.5, generator=torch.Generator(), check=torch.tensor(torch.nan))
    assert torch.equal(weight, before)

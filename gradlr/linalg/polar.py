"""The orthogonal part of a matrix: exactly through its Gram matrix, or approximately by Newton–Schulz steps."""

import torch
from torch import Tensor

from ..errors import ShapeError
from .axes import REPLICATED, Axis, gram
from .normalize import largest_entry, safe_reciprocal

# Quintic Newton–Schulz coefficients of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), as in the source
# notebook's zeropower_via_newtonschulz5: fastest growth near zero, singular values end between about 0.7 and 1.2.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def polar_factor(x: Tensor, *, rtol: float = 1e-5, weights=None, axis: Axis = REPLICATED) -> Tensor:
    """Nearest matrix with orthonormal columns, zero where `x` has no direction.

    Args:
        x: Tall matrix, shape (..., n, r) with r ≤ n, floating; not modified.
        rtol: Singular values below `rtol` times the largest count as zero (dimensionless).
        weights: Where given, a function from the singular values (..., r), descending, float64, to the singular values
            (..., r) of the result; ones where None. Masked directions stay zero.
        axis: How its rows are spread.

    Returns:
        `x (xᵀx)^(-1/2)`, shape (..., n, r), float32 or wider: singular values 1, or 0 where masked.

    Raises:
        ShapeError: `x` is wider than tall.

    Source: Higham, Functions of Matrices (2008), section 8.1, through the r × r Gram matrix: exact and matmul-bound where r ≪ n.
    """
    if x.ndim < 2 or axis.size(x.shape[-2]) < x.shape[-1]:
        raise ShapeError(f"polar_factor: x has shape {tuple(x.shape)}; it needs at least as many rows as columns")
    # float64: a Gram matrix squares the condition number, and 1e30 squared leaves float32.
    wide = x.double()
    basis = torch.linalg.eigh(gram(wide, axis)).eigenvectors.flip(-1)
    scores = wide @ basis
    values = axis.all_reduce_sum(scores.square().sum(dim=-2)).sqrt()
    is_direction = values > rtol * values.amax(dim=-1, keepdim=True)
    factors = safe_reciprocal(values) if weights is None else weights(values) * safe_reciprocal(values)
    factors = torch.where(is_direction, factors, 0.0)
    result = (scores * factors.unsqueeze(-2)) @ basis.mT
    return result if x.dtype == torch.float64 else result.float()


def leading_directions(x: Tensor, axis: Axis = REPLICATED) -> tuple[Tensor, Tensor]:
    """Right singular vectors and squared singular values of a tall matrix, largest first.

    Args:
        x: Shape (..., n, r), floating; not modified.
        axis: How its rows are spread.

    Returns:
        Q (..., r, r) orthogonal, in float32 or wider, and the squared singular values (..., r), float64, descending.
    """
    wide = x.double()
    energies, basis = torch.linalg.eigh(gram(wide, axis))
    basis = basis.flip(-1)
    return (basis if x.dtype == torch.float64 else basis.float()), energies.flip(-1).clamp(min=0)


def newton_schulz(x: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximate polar factor by quintic Newton–Schulz steps: the notebook's `zeropower_via_newtonschulz5`.

    Args:
        x: Shape (..., m, n), floating; not modified. Transposed first where it is taller than wide.
        steps: Number of steps (dimensionless).
        dtype: Floating type of the arithmetic and of the result; bfloat16 as in the notebook.

    Returns:
        Shape (..., m, n), `dtype`: the singular vectors of `x`, singular values between about 0.7 and 1.2 where those of
        `x` are not far below its Frobenius norm; zero for zero.

    Source: Muon, Jordan et al. 2024; the division by the Frobenius norm + 1e-7 as in the notebook.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = _shrink_huge(x, dtype).to(dtype)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def newton_schulz_sharded(x: Tensor, axis: Axis, *, steps: int = 5) -> Tensor:
    """The same of a tall matrix whose rows are spread, with one sum of r × r numbers: the steps are taken on the Gram matrix.

    Args:
        x: Shape (..., n, r), r ≤ n over all processes, float32 or wider, entries of ordinary size; not modified.
        axis: How its rows are spread.
        steps: Number of steps (dimensionless).

    Returns:
        The rows of the whole's approximate polar factor that lie here, (..., n, r).
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    products = gram(x, axis)
    scale = 1 / (products.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None].sqrt() + 1e-7)
    products, eye = products * scale**2, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    steps_taken = eye * scale
    for _ in range(steps):
        # X ← X p(XᵀX) turns XᵀX into p XᵀX p, and all of these commute.
        polynomial = a * eye + b * products + c * products @ products
        steps_taken, products = steps_taken @ polynomial, polynomial @ products @ polynomial
    return x @ steps_taken


def _shrink_huge(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Squares of entries above about 1e18 leave float32, those above 256 float16. Powers of two are exact, so ordinary input
    # keeps every bit.
    peak = largest_entry(x)
    _, exponent = torch.frexp(peak if peak.dtype == torch.float64 else peak.float())
    shift = torch.where(exponent > (4 if dtype == torch.float16 else 40), -exponent, torch.zeros_like(exponent))
    return x * torch.ldexp(torch.ones_like(peak), shift)

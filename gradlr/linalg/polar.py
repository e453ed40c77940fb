"""The orthogonal part of a matrix, approximately: Newton–Schulz steps on the matrix, or on its Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .axes import REPLICATED, Axis
from .normalize import frobenius_norm, largest_entry

# Quintic Newton–Schulz coefficients of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), as in the source
# notebook's zeropower_via_newtonschulz5: fastest growth near zero, singular values end between about 0.7 and 1.2.
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


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
    # Squares of entries above about 1e18 leave float32, those above 256 float16. Powers of two are exact, so ordinary input
    # keeps every bit.
    peak = largest_entry(x)
    _, exponent = torch.frexp(peak if peak.dtype == torch.float64 else peak.float())
    shift = torch.where(exponent > (4 if dtype == torch.float16 else 40), -exponent, torch.zeros_like(exponent))
    x = (x * torch.ldexp(torch.ones_like(peak), shift)).to(dtype)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        # a X + b X Xᵀ X + c (X Xᵀ)² X: an odd polynomial acts on the singular values and leaves the vectors alone.
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def newton_schulz_by_gram(
    x: Tensor, *, axis: Axis = REPLICATED, steps: int = 5, size: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The same steps for a tall matrix, all taken on its Gram matrix: two products with n rows instead of ten.

    Args:
        x: Shape (..., n, r) with r ≤ n, any floating dtype, entries of any size; not modified.
        axis: How its rows are spread; one number and r × r are summed.
        steps: Number of steps.
        size: What the factor is multiplied with; a 0-dim tensor in compiled graphs.

    Returns:
        The approximate polar factor times `size`, (..., n, r), float32 or wider, of which each process has its rows, zero for
        zero; the Frobenius norms (..., 1, 1) of x, at least the smallest normal number; and numbers (...) that are finite if and
        only if all of it is.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    norm = frobenius_norm(x, axis)
    x, batch = x / norm, x.shape[:-2]
    # A product that adds: of one matrix, or of a batch with one axis.
    x, add = (x, torch.addmm) if x.ndim == 2 else (x.reshape(-1, *x.shape[-2:]), torch.baddbmm)
    # X ← X p(XᵀX) turns P = XᵀX into p P p, and all of these commute: with the product F of all p so far, and S = F P₀, P is F S.
    # F and S lie in one matrix, so that one product is a step of both; p = a + q, so that what is multiplied is added.
    both = _identity_and_gram(x, axis)
    factor, products = both.chunk(2, dim=-2)
    for _ in range(steps - 1):
        q = add(products, products, products, beta=b, alpha=c)
        both = add(both, both, q, beta=a)
        factor, scaled = both.chunk(2, dim=-2)
        products = factor @ scaled
    q = add(products, products, products, beta=b, alpha=c)
    last = 1.0 if isinstance(size, Tensor) else size
    factor = add(factor, factor, q, beta=a * last, alpha=last)
    found = x @ factor
    found = found * size if isinstance(size, Tensor) else found
    # What is not finite anywhere in x is in every entry of its powers.
    return (found if x.ndim == 2 else found.unflatten(0, batch)), norm, factor[..., 0, 0]


def _identity_and_gram(x: Tensor, axis: Axis) -> Tensor:
    """The identity, and below it XᵀX: (..., 2r, r)."""
    r = x.shape[-1]
    if x.ndim == 2 and axis.is_whole:
        both = torch.eye(2 * r, r, dtype=x.dtype, device=x.device)
        both[r:].addmm_(x.mT, x)
        return both
    products = x.mT @ x if axis.is_whole else axis.inner(x, x)
    return torch.cat([torch.eye(r, dtype=x.dtype, device=x.device).expand_as(products), products], dim=-2)

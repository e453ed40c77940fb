"""The norm of what waits for `step()`: kept where stock tools look for it, and limited."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..rules.base import require_positive
from ..tensors import widest

# torch.nn.utils.clip_grad_norm_ adds the same to the norm it divides by.
_EPS = 1e-6
# Two numbers of unit length that differ: what scales a norm keeps their ratio, what cuts values does not.
_SHARES = (0.6, 0.8)
# Of the ratio: far above the rounding of a factor in float32, far below what cutting at any value between them does.
_RATIO_RTOL = 1e-3


class GradNormProxy:
    """Keeps the global norm of all gradients that wait as the `.grad` of one extra parameter of the optimizer.

    That parameter, whose two rows have the length of the norm, is all that `GradScaler.unscale_`, `GradScaler.step` and
    `clip_grad_norm_` over the optimizer's parameters see: they find the true norm there (NaN where a gradient is not finite),
    scale it, and what they have multiplied it with is read off at the next gradient or at `step()`, and applied to the gradients
    themselves.

    Args:
        dtype: float32, or float64 for float64 parameters.
        device: Of the parameters.

    Attributes:
        parameter: The extra parameter; requires no gradient, is never written.
    """

    def __init__(self, *, dtype: torch.dtype, device: torch.device) -> None:
        # Rows, which what clips each row by itself (timm's adaptive clipping) treats unlike each other.
        self._shares = torch.tensor(_SHARES, dtype=dtype, device=device).unsqueeze(-1)
        self.parameter = nn.Parameter(torch.zeros_like(self._shares), requires_grad=False)
        self._norm = widest(torch.zeros((), dtype=dtype, device=device))
        self._version = 0
        self._energies: dict[int, Tensor] = {}
        self._total: Tensor | None = None

    def record(self, key: int, energy: Tensor) -> None:
        """A gradient has come: the squared norm of all that waits for parameter number `key`, 0-dim float64."""
        known = self._energies.get(key)
        self._energies[key] = energy
        if self._total is None:
            self._total = energy
        elif known is None:
            self._total = self._total + energy
        else:  # rounding may leave a difference of equal numbers below zero
            self._total = (self._total + (energy - known)).clamp_(min=0)
        self._show(self._total)

    def forget(self, key: int) -> None:
        """Nothing waits any more for parameter number `key`."""
        known = self._energies.pop(key, None)
        if not self._energies:
            self.clear()
        elif known is not None and self._total is not None:
            self._total = torch.stack(list(self._energies.values())).sum()  # what is left may lie far below what goes
            self._show(self._total)

    def _show(self, total: Tensor) -> None:
        # In the dtype of the shares: one of a single number decides nothing.
        self._norm = total.sqrt()
        self.parameter.grad = self._norm * self._shares
        self._version = self.parameter.grad._version

    @property
    def energy(self) -> Tensor | None:
        """Squared norm of all that waits, 0-dim float64; None where nothing does."""
        return self._total

    def become(self, energy: float) -> None:
        """The squared norm over all processes is this."""
        if self._total is not None:
            self._total = torch.full_like(self._total, energy)
            self._show(self._total)

    @property
    def is_touched(self) -> bool:
        """Whether somebody has written to the norm since the last gradient came."""
        grad = self.parameter.grad
        return grad is not None and self._total is not None and grad._version != self._version

    def is_changed(self) -> bool:
        """Whether somebody has, ways included that leave no trace but the value, as of `GradScaler`; waits for the device."""
        return self.is_touched or not bool((self.ratios() == 1).all())

    def ratios(self) -> Tensor:
        """What has become of both elements, (2,)."""
        grad = self.parameter.grad
        if grad is None or self._total is None:
            return torch.ones_like(self._shares).squeeze(-1)
        # A norm of zero, or one that has overflowed, tells nothing.
        is_telling = (self._norm > 0) & self._norm.isfinite()
        return torch.where(is_telling, grad / (self._norm * self._shares), torch.ones_like(grad)).squeeze(-1)

    def factor(self) -> Tensor:
        """What the gradients are to be multiplied with, 0-dim: 1, or what a scaler or clipping has done to the norm."""
        return self.ratios()[1]

    def is_even(self) -> Tensor:
        """0-dim boolean: whether the norm was scaled, or left alone; False where values were cut, as `clip_grad_value_` does."""
        smaller, larger = self.ratios()
        return ~((smaller - larger).abs() > _RATIO_RTOL * larger.abs())

    def settle(self, factor: Tensor) -> None:
        """All gradients that wait have been multiplied with the factor."""
        square = widest(factor) ** 2
        self._energies = {key: energy * square for key, energy in self._energies.items()}
        if self._total is not None:
            self._total = self._total * square
            self._show(self._total)

    def norm(self) -> Tensor:
        """The global norm now, scaled or clipped where somebody did so, 0-dim."""
        return self._norm * self.factor()

    def clear(self) -> None:
        """Nothing waits any more."""
        self._energies, self._total, self.parameter.grad = {}, None, None
        self._norm = torch.zeros_like(self._norm)


@dataclass
class GradClipper:
    """Limits the global norm of a step's gradients, as `torch.nn.utils.clip_grad_norm_` does.

    Attributes:
        max_norm: Gradients are scaled down to this norm; None for no limit. May be written to at any time.
        has_steps: Whether the gradients of a step wait for each other, so that their norm is known before the first update.

    Raises:
        ArgumentError: `max_norm`, given or written, is no positive finite number, or nothing waits.
    """

    has_steps: bool = True
    max_norm: float | None = None

    def __setattr__(self, name: str, value: float | None) -> None:
        if name == "max_norm" and value is not None:
            value = require_positive("max_grad_norm", value)
            if not self.has_steps:
                raise ArgumentError(
                    'a limit on the global norm needs all gradients before the first update: attach with apply="step", call '
                    "opt.step()"
                )
        super().__setattr__(name, value)

    @property
    def is_active(self) -> bool:
        """Whether anything is limited, so that the norm must be known exactly."""
        return self.max_norm is not None

    def factor(self, norm: Tensor) -> Tensor:
        """What a step of this norm is to be multiplied with, 0-dim in (0, 1]."""
        return torch.ones_like(norm) if self.max_norm is None else (self.max_norm / (norm + _EPS)).clamp(max=1.0)

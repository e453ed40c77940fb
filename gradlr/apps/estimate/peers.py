"""Other people's optimizers, as far as memory goes: what their packages allocate, keep and free, in their order."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ...layers.linear import is_transposed_linear

# bitsandbytes 0.50: `optim/optimizer.py`, Optimizer2State.init_state; smaller tensors keep 32 bits.
_BLOCK_SIZE, _SMALLEST_8BIT = 256, 4096


class Peer:
    """An optimizer of one parameter at a time.

    Attributes:
        parameters: Those that it updates.
        state: Tensors by parameter, in the package's names.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {parameter: {} for parameter in self.parameters}

    def update(self, parameter: nn.Parameter) -> None:
        """Take `parameter.grad` and write."""
        raise NotImplementedError


class AdamW8bit(Peer):
    """bitsandbytes' AdamW8bit: two bytes a number and a scale for each block of 256; one kernel, no temporaries."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters)
        for parameter in self.parameters:
            count, device = parameter.numel(), parameter.device
            dtype = torch.uint8 if count >= _SMALLEST_8BIT else torch.float32
            state = {f"state{i}": torch.zeros_like(parameter, dtype=dtype) for i in (1, 2)}
            if dtype == torch.uint8:
                blocks = math.ceil(count / _BLOCK_SIZE)
                state |= {f"absmax{i}": torch.zeros(blocks, dtype=torch.float32, device=device) for i in (1, 2)}
            self.state[parameter] = state
        # Shared by all parameters: what the 256 codes of the two moments stand for.
        self.codes = [torch.zeros(256, dtype=torch.float32) for _ in range(2)]

    def update(self, parameter: nn.Parameter) -> None:
        pass


class LowRankAdam(Peer):
    """Adam whose moments are those of a projected gradient; ordinary for parameters that are not projected.

    Args:
        parameters: All.
        projected: Which of them are projected.
        rank: r.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], projected: Iterable[nn.Parameter], rank: int) -> None:
        super().__init__(parameters)
        self.projected, self.rank = set(projected), rank

    def basis(self, gradient: Tensor, is_right: bool) -> Tensor:
        """What the gradient is multiplied with: (r, n) on the right where it is tall or square, (m, r) on the left."""
        raise NotImplementedError

    def direction(self, parameter: nn.Parameter, low: Tensor, moved: Tensor, is_right: bool) -> Tensor:
        """The update of a projected parameter from its projected gradient and what Adam made of that."""
        raise NotImplementedError

    def update(self, parameter: nn.Parameter) -> None:
        state, gradient, is_projected = self.state[parameter], parameter.grad, parameter in self.projected
        is_right = gradient.ndim == 2 and gradient.shape[0] >= gradient.shape[1]
        if is_projected:
            # In the step that renews the basis, the old one lives until the new one is there.
            state["basis"] = self.basis(gradient, is_right)
            gradient = gradient @ state["basis"].t() if is_right else state["basis"].t() @ gradient
        if "exp_avg" not in state:
            state |= {"exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
        state["exp_avg"].mul_(0.9).add_(gradient, alpha=0.1)
        state["exp_avg_sq"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        denominator = state["exp_avg_sq"].sqrt().add_(1e-6)
        moved = state["exp_avg"] / denominator
        if is_projected:
            moved = self.direction(parameter, gradient, moved, is_right)
        parameter.add_(moved, alpha=-1e-3)


class GaLore(LowRankAdam):
    """galore-torch 1.0: `adamw.py` and `galore_projector.py`, in a step that renews the basis (one in 200)."""

    def basis(self, gradient: Tensor, is_right: bool) -> Tensor:
        u, s, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
        # A slice: of a float32 gradient it keeps all of Vh, or U, alive; of others it is a copy in their dtype.
        rank = min(self.rank, len(s))
        return vh[:rank].type(gradient.dtype) if is_right else u[:, :rank].type(gradient.dtype)

    def direction(self, parameter: nn.Parameter, low: Tensor, moved: Tensor, is_right: bool) -> Tensor:
        basis = self.state[parameter]["basis"]
        return (moved @ basis if is_right else basis @ moved) * 0.25


class Apollo(LowRankAdam):
    """apollo-torch 1.0: `apollo.py` and `random_projector.py`, scaling per channel."""

    def basis(self, gradient: Tensor, is_right: bool) -> Tensor:
        shape = (self.rank, gradient.shape[1]) if is_right else (gradient.shape[0], self.rank)
        wide = gradient.float()
        draw = torch.randn(shape, dtype=wide.dtype, device=wide.device) / math.sqrt(self.rank)
        return draw.type(gradient.dtype)

    def direction(self, parameter: nn.Parameter, low: Tensor, moved: Tensor, is_right: bool) -> Tensor:
        axis = 1 if is_right else 0
        factor = torch.norm(moved, dim=axis) / (torch.norm(low, dim=axis) + 1e-8)
        scaled = parameter.grad * (factor.unsqueeze(1) if axis == 1 else factor)
        self.state[parameter]["scaled_grad"] = norm = torch.norm(scaled)
        scaled = scaled / norm
        scaled *= 1.0
        return scaled


class LowRankAdapter(nn.Module):
    """peft's LoRA around a frozen layer: `tuners/lora/layer.py`, Linear.forward, with adapters in float32.

    Args:
        base: `nn.Linear`, or transformers' Conv1D.
        rank: r.
    """

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        out_features, in_features = base.weight.shape if not is_transposed_linear(base) else reversed(base.weight.shape)
        self.base = base
        self.a = nn.Linear(in_features, rank, bias=False)
        self.b = nn.Linear(rank, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        dtype = result.dtype
        x = x.to(self.a.weight.dtype)  # lives until the end
        result = result + self.b(self.a(x)) * 2.0
        return result.to(dtype)


def add_adapters(model: nn.Module, weights: Iterable[nn.Parameter], rank: int) -> list[nn.Parameter]:
    """Freeze the model and put an adapter around each layer whose weight is one of `weights`; returns the adapters' weights."""
    wanted = {id(weight) for weight in weights}
    model.requires_grad_(False)
    found = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            is_linear = type(child) is nn.Linear or is_transposed_linear(child)
            if is_linear and id(child.weight) in wanted:
                adapter = LowRankAdapter(child, rank)
                setattr(parent, name, adapter)
                found += [adapter.a.weight, adapter.b.weight]
    return found

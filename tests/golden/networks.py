"""Small networks in float64 with data of many more samples than the ranks trained with: every gradient is well conditioned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, mse_loss

VOCABULARY, WIDTH = 20, 24


class Layers(nn.Module):
    """Three matrices, a norm, a bias. At r = 4 and k = 3 the last is smaller than its sketch and waits for `step()` as it is."""

    inputs, outputs = 24, 14

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(self.inputs, 48)
        self.norm = nn.LayerNorm(48)
        self.second = nn.Linear(48, 40, bias=False)
        self.last = nn.Linear(40, self.outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(self.norm(torch.tanh(self.first(x))))))

    def loss(self, step: int, part: slice) -> Tensor:
        # Targets are noise about a teacher: the loss falls, and the gradient never comes near zero, where directions get lost.
        x, noise = _normal(step, 96, self.inputs), _normal(step + 1000, 96, self.outputs)
        y = torch.tanh(x @ _normal(9999, self.inputs, self.outputs) / 2) + noise / 2
        return mse_loss(self(x[part]), y[part])


class Falling(Layers):
    """The same without the noise, on one batch: the loss falls to a fraction of what it was."""

    def loss(self, step: int, part: slice) -> Tensor:
        x = _normal(0, 96, self.inputs)
        return mse_loss(self(x[part]), x[part] @ _normal(9999, self.inputs, self.outputs) / 4 + 1)


class Upcast(nn.Module):
    """Two matrices and a bias in bfloat16, computed with in float64: sums of bfloat16 would differ between processors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 24)
        self.last = nn.Linear(24, 16, bias=False)

    def loss(self, step: int, part: slice) -> Tensor:
        x, y = _normal(step, 64, 20), _normal(step + 1000, 64, 16)
        hidden = torch.tanh(linear(x[part], self.first.weight.double(), self.first.bias.double()))
        return mse_loss(linear(hidden, self.last.weight.double()), y[part])


class Tokens(nn.Module):
    """An embedding, a norm, two matrices over sequences, and a head that is a table of its own or the embedding itself."""

    def __init__(self, *, is_tied: bool = False, is_sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, sparse=is_sparse)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))

    def loss(self, step: int, part: slice) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (16, 9), generator=generator)[part]
        return cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Images(nn.Module):
    """An ordinary, a grouped and a transposed convolution, from images to images of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.ordinary = nn.Conv2d(3, 12, kernel_size=3, padding=1)
        self.grouped = nn.Conv2d(12, 16, kernel_size=3, padding=1, groups=2, bias=False)
        self.transposed = nn.ConvTranspose2d(16, 4, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.transposed(torch.tanh(self.grouped(torch.tanh(self.ordinary(x)))))

    def loss(self, step: int, part: slice) -> Tensor:
        return mse_loss(self(_normal(step, 8, 3, 6, 6)[part]), _normal(step + 1000, 8, 4, 12, 12)[part])


class Experts(nn.Module):
    """A fused projection that holds three matrices, and a stack of three experts that are stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(20, 48)
        self.experts = nn.Parameter(torch.randn(3, 16, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("tei,eio->to", torch.tanh(self.fused(x)).unflatten(-1, (3, 16)), self.experts)

    def loss(self, step: int, part: slice) -> Tensor:
        return mse_loss(self(_normal(step, 96, 20)[part]), _normal(step + 1000, 96, 12)[part])


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

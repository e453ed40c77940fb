"""A decoder shaped as Llama, with random weights and in plain torch: for time and memory, not for what it says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from einops import rearrange
from torch import Tensor, nn

_INIT_STD = 0.02
_ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a decoder.

    Attributes:
        width, mlp: Of the residual stream, and of the gated MLP between.
        depth: Number of blocks.
        heads, kv_heads: Of queries; of keys and values, which queries share.
        vocabulary: Rows of the embedding.
        is_tied: Whether the head is the embedding once more.
    """

    width: int
    mlp: int
    depth: int
    heads: int
    kv_heads: int
    vocabulary: int
    is_tied: bool = False


class Llama(nn.Module):
    """Token numbers (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.is_tied:
            self.head.weight = self.embedding.weight
        self.head_size = shape.width // shape.heads

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        turns = _turns(tokens.shape[-1], self.head_size, x)
        for block in self.blocks:
            x = block(x, turns)
        return self.head(self.norm(x))


def random_llama(shape: LlamaShape, device: str, dtype: torch.dtype) -> Llama:
    """A model with normal weights, always the same ones on a device."""
    with torch.device(device):
        model = Llama(shape).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, _INIT_STD, generator=generator)
    return model


class _Block(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        width, kv_width = shape.width, shape.width // shape.heads * shape.kv_heads
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = nn.Linear(width, kv_width, bias=False), nn.Linear(width, kv_width, bias=False)
        self.gate, self.up = nn.Linear(width, shape.mlp, bias=False), nn.Linear(width, shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, width, bias=False)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self._attend(self.attention_norm(x), turns)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def _attend(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        projected = (self.query(x), self.heads), (self.key(x), self.kv_heads), (self.value(x), self.kv_heads)
        q, k, v = (rearrange(part, "b l (h d) -> b h l d", h=heads) for part, heads in projected)
        q, k, is_shared = _turned(q, *turns), _turned(k, *turns), self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_shared)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))


def _turns(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    # Rotary positions: cosines and sines (length, size).
    frequencies = _ROPE_BASE ** (-torch.arange(0, size, 2, device=like.device) / size)
    angles = torch.outer(torch.arange(length, device=like.device), frequencies).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines

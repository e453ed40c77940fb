"""Models known by name: the published shapes, in plain torch, with the operations of transformers' own code.

What autograd keeps depends on each operation; so these do what transformers 5.23 does, dropout aside, where memory is concerned:
norms and rotations of half precision in float32, the loss in float32 over all positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer.

    Attributes:
        width: Of the residual stream.
        inner: Of the MLP.
        depth: Number of blocks.
        heads: Of the queries.
        key_heads: Of keys and values.
        vocabulary: Number of tokens.
        context: Longest sequence.
        dtype: As it was published.
    """

    width: int
    inner: int
    depth: int
    heads: int
    key_heads: int
    vocabulary: int
    context: int
    dtype: torch.dtype


def causal_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of the next token, in float32: transformers' `ForCausalLMLoss`."""
    logits = logits.float()
    labels = F.pad(tokens, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))


class LlamaNorm(nn.Module):
    """RMSNorm in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cosine) + (turned * sine)


class LlamaBlock(nn.Module):
    """Attention with rotated, grouped heads and a gated MLP, each after a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.width, shape.inner
        self.head_size = width // shape.heads
        self.repeats = shape.heads // shape.key_heads
        self.attention_norm, self.mlp_norm = LlamaNorm(width), LlamaNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, shape.key_heads * self.head_size, bias=False)
        self.v = nn.Linear(width, shape.key_heads * self.head_size, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attend(self.attention_norm(x), cosine, sine)
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def attend(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        form = (*x.shape[:-1], -1, self.head_size)
        q, k, v = (linear(x).view(form).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = _rotated(q, cosine, sine), _rotated(k, cosine, sine)
        y = F.scaled_dot_product_attention(q, self._repeated(k), self._repeated(v), is_causal=True)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:-1], -1).contiguous())

    def _repeated(self, x: Tensor) -> Tensor:
        if self.repeats == 1:
            return x
        return x[:, :, None].expand(-1, -1, self.repeats, -1, -1).reshape(x.shape[0], -1, *x.shape[2:])


class Llama(nn.Module):
    """Touvron et al. 2023, arXiv 2307.09288. Maps token ids to the loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(LlamaBlock(shape) for _ in range(shape.depth))
        self.norm = LlamaNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cosine, sine = self._angles(x)
        for block in self.blocks:
            x = block(x, cosine, sine)
        return causal_loss(self.head(self.norm(x)), tokens)

    @torch.no_grad()
    def _angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = self.blocks[0].head_size
        rates = 1e4 ** (-torch.arange(0, size, 2, device=x.device) / size)
        angles = torch.arange(x.shape[1], device=x.device)[None, None, :, None] * torch.cat((rates, rates))
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class GPT2Block(nn.Module):
    """Attention and MLP with biases, each after a LayerNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv, self.out = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)
        self.up, self.down = nn.Linear(shape.width, shape.inner), nn.Linear(shape.inner, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.attention_norm(x)).split(x.shape[-1], dim=-1)
        q, k, v = (part.view(*x.shape[:-1], self.heads, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape).contiguous())
        y = self.up(self.mlp_norm(x))
        # Written out, as transformers' gelu_new is: each product is kept for backward.
        y = 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0))))
        return x + self.down(y)


class GPT2(nn.Module):
    """Radford et al. 2019. Maps token ids to the loss; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(GPT2Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return causal_loss(F.linear(self.norm(x), self.embedding.weight), tokens)


class BertBlock(nn.Module):
    """Attention to all positions and an MLP, each before a LayerNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, width = shape.heads, shape.width
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, shape.inner), nn.Linear(shape.inner, width)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        form = (*x.shape[:-1], self.heads, -1)
        q, k, v = (linear(x).view(form).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape).contiguous()
        x = self.attention_norm(self.out(y) + x)
        return self.mlp_norm(self.down(F.gelu(self.up(x))) + x)


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2, a BERT (Wang et al. 2020, arXiv 2002.10957). Maps token ids to the sum of the mean embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.segment = nn.Embedding(2, shape.width)
        self.norm = nn.LayerNorm(shape.width)
        self.blocks = nn.ModuleList(BertBlock(shape) for _ in range(shape.depth))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.segment(torch.zeros_like(tokens)) + self.position(places)
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=1).sum()


_LLAMA = {"vocabulary": 32_000, "context": 4096, "dtype": torch.bfloat16}

SHAPES: dict[str, tuple[Callable[[Shape], nn.Module], Shape]] = {
    "llama-7b": (Llama, Shape(4096, 11_008, 32, 32, 32, **_LLAMA)),
    "llama-13b": (Llama, Shape(5120, 13_824, 40, 40, 40, **_LLAMA)),
    "llama-70b": (Llama, Shape(8192, 28_672, 80, 64, 8, **_LLAMA)),
    "gpt2": (GPT2, Shape(768, 3072, 12, 12, 12, 50_257, 1024, torch.float32)),
    "minilm": (MiniLM, Shape(384, 1536, 6, 12, 12, 30_522, 512, torch.float32)),
}

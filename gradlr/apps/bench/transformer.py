"""A small decoder-only transformer over bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 256
INIT_STD = 0.02


class ByteTransformer(nn.Module):
    """Pre-norm GPT over the 256 byte values, output head tied to the token embedding.

    Args:
        dim: Width, a multiple of heads.
        depth: Number of blocks.
        heads: Of attention.
        context: Longest input in bytes.

    Attributes:
        config: These four, so that `ByteTransformer(**config)` rebuilds the model.
        is_checkpointing: Whether a block's activations are made again in backward instead of kept.

    Raises:
        ValueError: heads does not divide dim.
    """

    _no_split_modules = ("Block",)  # as in transformers' models: what is sharded as one

    def __init__(self, dim: int = 128, depth: int = 4, heads: int = 4, context: int = 256) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim} and heads={heads}")
        self.config = {"dim": dim, "depth": depth, "heads": heads, "context": context}
        self.token = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.is_checkpointing = False
        self._initialize(depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 tokens (batch, length) to next-byte logits (batch, length, 256).

        Raises:
            ValueError: length exceeds the context.
        """
        length = tokens.shape[1]
        if length > self.config["context"]:
            raise ValueError(f"length {length} exceeds the context of {self.config['context']} bytes")
        x = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointing and self.training else block(x)
        return F.linear(self.norm(x), self.token.weight)

    def _initialize(self, depth: int) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        # Two additions per block feed the residual stream: this keeps its variance independent of depth.
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.2.weight")):
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(2 * depth))


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added to the residual stream (batch, length, dim)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = CausalAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (batch, length, dim)."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CausalAttention(nn.Module):
    """Multi-head self-attention to the same and earlier positions, with one fused qkv projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape (batch, length, dim)."""
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))


def language_model_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats per byte, 0-dim; inputs and targets are int64 of shape (batch, length)."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean of language_model_loss over (inputs, targets) batches, in nats per byte.

    Runs in eval mode without gradients, moves batches to the model's device and restores the model's mode.

    Raises:
        ValueError: there are no batches.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        losses = [language_model_loss(model, x.to(device), y.to(device)).item() for x, y in batches]
    finally:
        model.train(was_training)
    if not losses:
        raise ValueError("evaluate needs at least one batch")
    return math.fsum(losses) / len(losses)

"""Models without values: parameters and buffers with shapes, dtypes and strides, and no memory."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ...errors import ArgumentError


def fake_copy(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None) -> nn.Module:
    """A copy whose parameters and buffers are fake tensors on the CPU.

    Args:
        model: On any device, the meta device included; not changed.
        mode: Whose tensors they are.
        dtype: Of all floating parameters and saved buffers; their own where None.
    """
    saved = {id(value) for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)}
    blanks: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        kept = tensor.dtype if dtype is None or id(tensor) not in saved or not tensor.is_floating_point() else dtype
        with mode:
            blank = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kept, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            blanks[id(tensor)] = nn.Parameter(blank, requires_grad=tensor.requires_grad) if is_parameter else blank
    return copy.deepcopy(model, blanks)


def checkpoint_blocks(model: nn.Module, *, preserve_rng_state: bool = True) -> None:
    """Recompute each block in backward: transformers' own switch where there is one, else every member of the longest list.

    Args:
        model: Changed in place.
        preserve_rng_state: As for `torch.utils.checkpoint.checkpoint`: whether dropout draws the same again.

    Raises:
        ArgumentError: it has no `nn.ModuleList` or `nn.Sequential` of two blocks or more.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
    for switch in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # transformers' new name, and its old
        if hasattr(model, switch):
            getattr(model, switch)(options)
            return
    blocks = blocks_of(model)
    if not blocks:
        raise ArgumentError(
            f"checkpointing=True: {type(model).__name__} has no nn.ModuleList or nn.Sequential of blocks; wrap its blocks in "
            "torch.utils.checkpoint.checkpoint yourself and leave checkpointing out"
        )
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, **options)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that transformers names, inner ones first; else the members of the longest list of two modules or more."""
    names = getattr(model, "_no_split_modules", None) or ()
    if blocks := [module for module in model.modules() if type(module).__name__ in names]:
        return blocks[::-1]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1]
    return list(max(lists, key=len, default=()))

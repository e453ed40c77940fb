"""adapter_config.json: what peft must be told to put each tensor in its place."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch import nn

from .plan import AdapterPlan

# The names by which peft recognizes a tied embedding or head.
_TIED_NAMES = ("embed_tokens", "lm_head")
# peft takes no empty list of targets; this one matches nothing.
_NO_TARGETS = "dummy-target-modules"


def adapter_config(plan: AdapterPlan, model: nn.Module, ranks: dict[str, int]) -> dict[str, Any]:
    """A LoraConfig as plain values.

    Args:
        plan: What goes where.
        model: The fine-tuned model.
        ranks: Rank of each low-rank layer.

    Returns:
        lora_alpha = r for each layer, so that the scaling is 1; layers whose rank is not the most frequent one stand in
        `rank_pattern` and `alpha_pattern`.
    """
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": _targets(plan),
        "modules_to_save": plan.saved or None,
        "fan_in_fan_out": any(plan.targets.values()),
        "bias": "lora_only" if plan.bias_form == "base_layer" else "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", "") or None,
    }
    # Younger than the rest: older versions of peft read the adapter where it is not needed.
    config |= {"lora_bias": True} if plan.bias_form == "lora_bias" else {}
    return config | ({"ensure_weight_tying": True} if _is_tie_known(plan, model) else {})


def _targets(plan: AdapterPlan) -> list[str] | str:
    # peft also takes every module whose name ends with one of a list; a text is a pattern for whole names.
    ends = tuple(f".{name}" for name in plan.targets)
    is_list_exact = not any(name.endswith(ends) and name not in plan.targets for name in plan.modules)
    names = sorted(plan.targets)
    return (names if is_list_exact else "|".join(map(re.escape, names))) or _NO_TARGETS


def _is_tie_known(plan: AdapterPlan, model: nn.Module) -> bool:
    """Whether peft can keep the tie: between the input embedding and one head without a bias, under a name that it knows."""
    embedding = getattr(model, "get_input_embeddings", None)
    if embedding is None or not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    weight = getattr(embedding(), "weight", None)
    tied = [name for name, module in plan.modules.items() if weight is not None and getattr(module, "weight", None) is weight]
    heads = [name for name in tied if isinstance(head := plan.modules[name], nn.Linear) and head.bias is None]
    is_named = any(name.rpartition(".")[2] in _TIED_NAMES for name in tied)
    return len(tied) == 2 and len(heads) == 1 and is_named and set(tied) <= set(plan.saved)

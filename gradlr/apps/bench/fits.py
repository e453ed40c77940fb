"""Which models fit on which cards: what `gradlr.estimate` tells of models of 1 to 70 billion weights, trained in six ways."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from ..estimate import CONFIGS, METHODS, estimate
from .environment import environment, markdown

GIB = 2**30
# In GiB, as they are sold.
CARDS = (8, 12, 16, 24, 48, 80)
# Of a card, GiB that an estimate leaves free: the CUDA context, workspaces of libraries, fragments of the allocator.
SPARE = 1

# Blocks of the shallow models that stand for a deep one: enough for AdamW's gradients to be more than the logits.
SHALLOW = (6, 8)

MODELS = {
    "1b": "llama-3.2-1b",
    "3b": "llama-3.2-3b",
    "8b": "llama-3.1-8b",
    "14b": "qwen3-14b",
    "32b": "qwen3-32b",
    "70b": "llama-3.1-70b",
}
# Name of a row → method and options. Weights are in bfloat16 where nothing else is said, and so are AdamW's moments.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("adamw", "adamw8bit", "lora", "qlora", "gradlr_adaptor")},
    "gradlr_int8": ("gradlr_adaptor", {"weights": "int8"}),
}


def measure(models: Sequence[str] = tuple(MODELS), ways: Sequence[str] = tuple(WAYS), *, tokens: int = 2048) -> dict[str, Any]:
    """GiB of the peak of a training step, blocks recomputed, as a JSON-able report; nothing is allocated.

    Args:
        models: Keys of `MODELS`.
        ways: Keys of `WAYS`; each with logits and without.
        tokens: Of the one sequence of a step.
    """
    results = [
        _estimated(model, way, tokens, is_chunked=is_chunked) for model in models for way in ways for is_chunked in (False, True)
    ]
    return {"environment": environment(), "workload": {"tokens": tokens}, "results": results}


def _estimated(model: str, way: str, tokens: int, *, is_chunked: bool) -> dict[str, Any]:
    method, options = WAYS[way]
    how = {"method": method, "tokens": tokens, "checkpointing": True, "chunked_head": is_chunked, "device": "cuda", **options}
    sizes = peak_by_depth(MODELS[model], how)
    label = METHODS[method].label + (", int8" if options else "") + (", chunked head" if is_chunked else "")
    return {"model": model, "way": way, "chunked_head": is_chunked, "label": label, **sizes}


def peak_by_depth(name: str, how: dict[str, Any], most: int = 32) -> dict[str, Any]:
    """GiB at the peak, and what they are; of a model with more than `most` blocks by the line through two shallow ones.

    Every block adds the same weights, state, gradients and checkpoint, and the peak is at the same place from a few blocks on.
    """
    config = importlib.import_module("transformers").AutoConfig.from_pretrained(CONFIGS[name])
    depth = config.num_hidden_layers
    depths = (depth,) if depth <= most else SHALLOW
    found = []
    for config.num_hidden_layers in depths:
        one = estimate(config, **how)
        found.append({"peak_gib": one.peak, **{f"{kind}_gib": held for kind, held in one.at_peak.items()}})
    steps = (depth - depths[0]) / (depths[-1] - depths[0]) if len(depths) > 1 else 0
    first, last = found[0], found[-1]
    return {key: round((first[key] + steps * (last[key] - first[key])) / GIB, 2) for key in first}


def smallest_card(peak_gib: float) -> str:
    """The smallest card that holds so much and what is spared, in words."""
    return next((f"{card} GB" for card in CARDS if peak_gib <= card - SPARE), "none")


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table: GiB and the smallest card, a column for each model."""
    results = report["results"]
    models = list(dict.fromkeys(row["model"] for row in results))
    found = {(row["label"], row["model"]): row["peak_gib"] for row in results}
    rows = []
    for label in dict.fromkeys(row["label"] for row in results):
        peaks = [found[label, model] for model in models]
        rows.append((label, *(f"{peak:.1f}: {smallest_card(peak)}" for peak in peaks)))
    return markdown(("method", *(MODELS[model] for model in models)), rows)

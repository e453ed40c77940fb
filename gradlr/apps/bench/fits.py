"""Which models fit on which cards: what `gradlr.estimate` tells of models of 1 to 70 billion weights, trained in six ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..estimate import METHODS, estimate
from .environment import environment, markdown

GIB = 2**30
# In GiB, as they are sold.
CARDS = (8, 12, 16, 24, 48, 80)
# Of a card, GiB that an estimate leaves free: the CUDA context, workspaces of libraries, fragments of the allocator.
SPARE = 1

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
    found = estimate(
        MODELS[model], method=method, tokens=tokens, checkpointing=True, chunked_head=is_chunked, device="cuda", **options
    )  # fmt: skip
    label = METHODS[method].label + (", int8" if options else "") + (", chunked head" if is_chunked else "")
    parts = {kind: round(held / GIB, 3) for kind, held in found.at_peak.items()}
    sizes = {"parameters": found.parameters, "peak_gib": round(found.peak / GIB, 2), "at_peak_gib": parts}
    return {"model": model, "way": way, "chunked_head": is_chunked, "label": label, **sizes}


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

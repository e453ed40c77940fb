"""What is trained in a comparison, by name, and the schedule that all of it shares.

A workload is a frozen dataclass with `steps`, `batch_size`, steps of `warmup` and sizes of its own, which a report tells; `name`;
`rate_scale`, a factor on every baseline's grid of learning rates; `needs_pretrained`, whether adapters on frozen weights make
sense; `times_apart`, whether the steps of all baselines are timed in turns afterwards, or those of the runs count, where so many
models would not fit; `model(seed, device)`, before training; `losses(model, seed)`, one function per step that computes the
training loss; and `evaluate(model)`, `loss` on held-out data in nats, `accuracy` where there are classes, and `general` where
forgetting is measured. All depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable

from .classification import Classification, Digits, SourceClassification
from .language import FineTuning, FromScratch, SmallBatches, Wide
from .smollm2 import SmolLM2, SmolLM2Chat

Workload = FineTuning | Classification | SmolLM2

WORKLOADS: dict[str, Callable[..., Workload]] = {
    kind.name: kind for kind in (FineTuning, FromScratch, SmallBatches, Wide, SourceClassification, Digits, SmolLM2, SmolLM2Chat)
}


def rate_factor(workload: Workload, step: int) -> float:
    """Factor on the learning rate at a step counted from 0, the same for every baseline: warm-up, then linear to a tenth."""
    return min(1.0, (step + 1) / workload.warmup) * (1.0 - 0.9 * step / workload.steps)

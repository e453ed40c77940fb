"""Masks of single entries of a weight: zeros in its gradient, which an update of few directions does not keep."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from ..errors import warn
from ..gradient import Dense, GradientOperator
from ..rules import Rule
from .record import ParamRecord

_WAYS_OUT = (
    'A rule that leaves zeros alone is "multi_normalized" (no state) or "adam": groups=[{"match": "NAME", "rule": ...}] of attach'
)


def mixes_entries(rule: Rule) -> bool:
    """Whether an entry that is zero in the gradient moves all the same, where its row and its column are not zero as a whole."""
    return not (rule.keeps_zeros or rule.is_elementwise)


class HookMasks:
    """Looks once at the gradient of each weight on which somebody has registered a hook: a mask there is told once.

    Hooks may do anything else with a gradient, and they act on it before the update is made of it, as with any optimizer.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._has_warned = False

    def look(self, record: ParamRecord, gradient: GradientOperator) -> None:
        """Tell of zeros inside the rows and columns that are not zero as a whole. Waits for the device, once a parameter."""
        if self._has_warned or record.index in self._seen or not (isinstance(gradient, Dense) and mixes_entries(record.rule)):
            return
        self._seen.add(record.index)
        filled = gradient.stored != 0
        lost = int((filled.any(dim=-1, keepdim=True) & filled.any(dim=-2, keepdim=True) & ~filled).sum())
        if lost:
            self._has_warned = True
            warn(
                f"{record.plan.name!r} has a hook, and its gradient comes with {lost} zeros between other entries, as a mask "
                f"makes them: the update of rule {record.rule.name!r} is not zero there, so masked weights move. (Rows and "
                f"columns that are zero as a whole stay.) {_WAYS_OUT}; or mask the weight itself after each update"
            )


def pruned_message(model: nn.Module, mixed: Container[int]) -> str | None:
    """What torch.nn.utils.prune has made of attached weights, by the names that it gives; None where it has done nothing.

    Args:
        model: What was attached to.
        mixed: `id`s of the parameters whose rules mix entries.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            mask = module._buffers.get(f"{name.removesuffix('_orig')}_mask") if name.endswith("_orig") else None
            if mask is not None and id(parameter) in mixed:
                full, kept = mask.numel(), int(mask.count_nonzero())
                return (
                    f"{f'{prefix}.{name}'.lstrip('.')!r} is pruned: {kept} of its {full} entries are left (others may be pruned "
                    "as well). What is masked stays masked, but an update has the norm of the whole matrix's and falls on few "
                    f"entries, which move about {(full / max(kept, 1)) ** 0.5:.2g} times as far as lr says; some of it falls on "
                    f"masked ones and is lost. Lower lr there. {_WAYS_OUT}"
                )
    return None

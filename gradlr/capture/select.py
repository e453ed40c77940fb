"""Which layers hand their gradient over without forming it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from ..engine.record import ParamRecord
from ..errors import ArgumentError, warn
from ..layers import LayerOp, LinearOp, layer_op
from ..layers.embedding import is_plain_embedding
from ..tensors import device_traits
from .layer_swap import CapturedLayer

CAPTURES = ("hook", "adaptor", "one_sided", "auto")
# What a multiplication in float32 costs in those of half precision, where these are faster: 400 to 50 TFLOP/s of an H100's
# products of matrices, without TF32.
_WIDE_PRICE = 8


def captured_layers(model: nn.Module, records: Iterable[ParamRecord], capture: str, *, is_immediate: bool) -> list[CapturedLayer]:
    """The layers whose weight gradient is not to be formed; marks their records.

    Linears, transformers' Conv1D and ungrouped convolutions under a matrix rule hand over output gradient and input ("adaptor"),
    or output gradient and the projected input ("one_sided"); heads (embeddings) always the former; embeddings their rows. Where
    somebody has registered a hook on the weight, the gradient is formed for it.

    Args:
        model: What is attached to.
        records: Of its attached parameters.
        capture: "hook" takes none of them, "auto" as "adaptor", except where that costs more than the gradient.
        is_immediate: Whether weights change inside backward: then a weight that several modules share is left to its hook, which
            fires when all of its uses are through.

    Raises:
        ArgumentError: `capture` is unknown.

    Warns:
        GradlrWarning: ranks are so large that hooks would be faster.
    """
    if capture not in CAPTURES:
        raise ArgumentError(f"capture={capture!r}: use one of {', '.join(CAPTURES)}")
    if capture == "hook":
        return []
    by_weight = {id(record.plan.parameter): record for record in records}
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    layers: list[CapturedLayer] = []
    slow: list[tuple[ParamRecord, CapturedLayer]] = []
    for module in model.modules():
        record = by_weight.get(id(module._parameters.get("weight")))
        layer = None if record is None else _layer(module, record, capture)
        if record is None or layer is None or layer.weight._backward_hooks:
            continue
        # Convolutions may share a weight and differ in stride or padding.
        is_alike = isinstance(layer.layer_op, LinearOp) and not record.rule.is_elementwise
        if layer.layer_op is not None and uses[id(layer.weight)] > 1 and (is_immediate or not is_alike):
            continue
        if is_slower_than_hook(record, layer):
            if capture == "auto":
                continue
            slow.append((record, layer))
        layers.append(layer)
        record.capture = "rows" if layer.layer_op is None else "one_sided" if layer.is_one_sided else "adaptor"
    if slow:
        warn(_advice(slow, capture))
    return layers


def _layer(module: nn.Module, record: ParamRecord, capture: str) -> CapturedLayer | None:
    rule = record.rule
    if type(module) is nn.Embedding:
        is_plain = is_plain_embedding(module) and record.plan.view.pattern is None
        return CapturedLayer(module, None) if is_plain and rule.accepts_row_factors else None
    found = layer_op(module)
    if found is None or found.view != record.plan.view or not _suits(found, record):
        return None
    return CapturedLayer(module, found, is_one_sided=capture == "one_sided" and rule.has_rank)


def _suits(found: LayerOp, record: ParamRecord) -> bool:
    return not record.rule.is_elementwise or (record.rule.accepts_row_factors and isinstance(found, LinearOp))


def work_per_token(record: ParamRecord, layer: CapturedLayer) -> int:
    """Multiplications a token that capture without a gradient takes: 2r(m + n), or r(m + 3n) with a power step on the inputs.

    Counted in those of the gradient's own product, which autograd makes in the weight's dtype.
    """
    m, n = record.plan.shape[-2:]
    work = record.largest_rank * (m + 3 * n if layer.is_one_sided else 2 * (m + n))
    return work * _WIDE_PRICE if _is_widened(record, layer) else work


def _is_widened(record: ParamRecord, layer: CapturedLayer) -> bool:
    """Whether half precision is faster, and capture multiplies in float32 all the same: all but a Linear's bfloat16."""
    weight = record.plan.parameter
    is_taken = weight.dtype == torch.bfloat16 and isinstance(layer.layer_op, LinearOp) and not layer.is_one_sided
    return record.is_narrow and device_traits(weight.device).has_half_products and not is_taken


def is_slower_than_hook(record: ParamRecord, layer: CapturedLayer) -> bool:
    """Whether that is more than the gradient's own mn; the rules of embeddings take the gradient by factors at any price."""
    m, n = record.plan.shape[-2:]
    return record.rule.has_rank and work_per_token(record, layer) > m * n


def _advice(slow: list[tuple[ParamRecord, CapturedLayer]], capture: str) -> str:
    record, layer = slow[0]
    m, n = record.plan.shape[-2:]
    work, formula = work_per_token(record, layer), "r(m + 3n)" if layer.is_one_sided else "2r(m + n)"
    if _is_widened(record, layer):
        formula = f"{_WIDE_PRICE} times {formula}, since they are in float32,"
    limit = max(1, m * n * record.largest_rank // work)
    return (
        f'capture="{capture}" costs more than hooks would for {len(slow)} of the layers: {record.plan.name!r} ({m} x {n}) with '
        f"rank {record.largest_rank} takes {formula} = {work:,} multiplications a token, its whole gradient mn = {m * n:,}. Use "
        f'a rank of {limit} at most there, or capture="auto", which leaves them to hooks'
    )

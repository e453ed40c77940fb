"""How each gradient is seen: which layers hand it over without forming it, and what a hook's gradient is as an operator."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .errors import ArgumentError, GradlrWarning
from .gradient import CapturedLayer, Dense, GradientOperator, LinearMap, Rows, Sketched, TokenMap, is_plain_embedding, linear_map
from .parameters import ParameterPlan, is_sharded, local
from .slots import Slot
from .views import share_memory

# Those of one process; "ddp" needs a group of them.
CAPTURES = ("hook", "adaptor", "one_sided", "auto")


def captured_layers(model: nn.Module, slots: Iterable[Slot], capture: str, *, is_immediate: bool) -> list[CapturedLayer]:
    """The layers whose weight gradient is not to be formed; marks their slots.

    Linears, transformers' Conv1D and ungrouped convolutions under a matrix rule hand over output gradient and input ("adaptor"),
    or output gradient and the projected input ("one_sided"); heads (tables) always the former; embeddings their rows. Where
    somebody has registered a hook on the weight, the gradient is formed for it.

    Args:
        model: What is attached to.
        slots: Of its attached parameters.
        capture: "hook" takes none of them, "auto" as "adaptor", except where that costs more than the gradient. "ddp" takes
            matrices only, of one layer each, whose sketches are smaller than the gradient.
        is_immediate: Whether weights change inside backward: then a weight that several modules share is left to its hook, which
            fires when all of its uses are through.

    Raises:
        ArgumentError: `capture` is unknown.

    Warns:
        GradlrWarning: ranks are so large that hooks would be faster.
    """
    if capture not in (*CAPTURES, "ddp"):
        raise ArgumentError(f"capture={capture!r}: use one of {', '.join(CAPTURES)}, ddp")
    if capture == "hook":
        return []
    by_weight = {id(slot.plan.parameter): slot for slot in slots}
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    layers, slow = [], []
    for module in model.modules():
        slot = by_weight.get(id(module._parameters.get("weight")))
        layer = None if slot is None else _layer(module, slot, capture)
        if layer is None:
            continue
        is_shared = uses[id(module.weight)] > 1
        # Convolutions may share a weight and differ in stride or padding.
        is_alike = isinstance(layer.linear_map, TokenMap) and not slot.rule.needs_dense
        if layer.linear_map is not None and is_shared and (is_immediate or not is_alike or capture == "ddp"):
            continue
        if module.weight._backward_hooks:
            continue
        if capture != "ddp" and is_slower_than_hook(slot, layer.is_one_sided):
            if capture == "auto":
                continue
            slow.append(slot)
        layers.append(layer)
        taken = "ddp" if capture == "ddp" else "adaptor"
        slot.capture = "rows" if layer.linear_map is None else "one_sided" if layer.is_one_sided else taken
    if slow:
        warnings.warn(_advice(slow, capture), GradlrWarning, stacklevel=4)
    return layers


def _layer(module: nn.Module, slot: Slot, capture: str) -> CapturedLayer | None:
    rule = slot.rule
    if capture == "ddp" and (rule.needs_dense or not _is_sketch_smaller(slot)):
        return None
    if type(module) is nn.Embedding:
        is_plain = is_plain_embedding(module) and slot.plan.view.pattern is None
        return CapturedLayer(module, None) if is_plain and rule.takes_factors else None
    found = linear_map(module)
    if found is None or found.pattern != slot.plan.view.pattern or not _suits(found, slot):
        return None
    return CapturedLayer(module, found, is_one_sided=capture == "one_sided" and not rule.needs_dense)


def _suits(found: LinearMap, slot: Slot) -> bool:
    return not slot.rule.needs_dense or (slot.rule.takes_factors and isinstance(found, TokenMap))


def _is_sketch_smaller(slot: Slot) -> bool:
    m, n = slot.plan.shape[-2:]
    return slot.largest_rank * (m + n) < m * n


def work_per_token(slot: Slot, is_one_sided: bool) -> int:
    """Multiplications a token that capture without a gradient takes: 2r(m + n), or r(m + 3n) with a power step on the inputs."""
    m, n = slot.plan.shape[-2:]
    return slot.largest_rank * (m + 3 * n if is_one_sided else 2 * (m + n))


def is_slower_than_hook(slot: Slot, is_one_sided: bool) -> bool:
    """Whether that is more than the gradient's own mn; the tables' rules take the gradient by factors at any price."""
    m, n = slot.plan.shape[-2:]
    return not slot.rule.needs_dense and work_per_token(slot, is_one_sided) > m * n


def _advice(slow: list[Slot], capture: str) -> str:
    slot, is_one_sided = slow[0], capture == "one_sided"
    m, n = slot.plan.shape[-2:]
    work, formula = work_per_token(slot, is_one_sided), "r(m + 3n)" if is_one_sided else "2r(m + n)"
    limit = max(1, m * n * slot.largest_rank // work)
    return (
        f'capture="{capture}" costs more than hooks would for {len(slow)} of the layers: {slot.plan.name!r} ({m} x {n}) with '
        f"rank {slot.largest_rank} takes {formula} = {work:,} multiplications a token, its whole gradient mn = {m * n:,}. Use a "
        f'rank of {limit} at most there, or capture="auto", which leaves them to hooks'
    )


def operator_of(plan: ParameterPlan, gradient: Tensor) -> GradientOperator | None:
    """The gradient that a hook was given, as an operator; None where it is complex, or sparse in another way than by rows."""
    if gradient.layout == torch.sparse_coo and gradient.sparse_dim() == 1 and plan.view.pattern is None and gradient.ndim == 2:
        gradient = gradient.detach()
        return Rows.summed(gradient._indices()[0], gradient._values(), plan.shape[0])
    if gradient.layout != torch.strided or gradient.is_complex():
        return None
    if is_sharded(gradient):
        gradient = _block(gradient.detach(), plan.parameter)
    is_shared = _is_storage_shared(gradient)
    matrix = plan.view.of(gradient.detach())
    is_copy = not share_memory(matrix, gradient)
    # Under create_graph the buffer belongs to the graph as well; another hook may have kept it.
    hooks = plan.parameter._post_accumulate_grad_hooks or ()
    is_ours = not (is_shared or gradient.requires_grad) and len(hooks) == 1
    return Dense(matrix, is_owned=is_copy or is_ours, layout=plan.layout)


def _block(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Of a sharded gradient what belongs to the parameter's part in this process."""
    if gradient.placements != parameter.placements:  # partial sums, as of a norm under sequence parallelism
        gradient = gradient.redistribute(placements=parameter.placements)
    block = local(gradient)
    block = block.wait() if hasattr(block, "wait") else block  # a redistribution may be under way
    if block.device.type == "cpu" and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # offloaded: older versions of torch have not waited for the copy
    return block


def _is_storage_shared(gradient: Tensor) -> bool:
    # autograd hands over a view of a buffer that may still wait in other nodes, as of a sum of two parameters. Two hold the
    # storage where nobody else does: the tensor, and the object that is asked here.
    return torch._C._storage_Use_Count(gradient.untyped_storage()._cdata) > 2


def waits_as_it_is(slot: Slot, gradient: GradientOperator) -> bool:
    """Whether a gradient that waits for `step()` need not be sketched: nothing smaller would serve."""
    if slot.rule.needs_dense or isinstance(gradient, Sketched):
        return True
    # Two bases and two products: r columns on the right, r + k on the left. Of a shard, what would wait here.
    layout = slot.plan.layout
    m, n = (-(-size // axis.parts) for axis, size in zip((layout.rows, layout.columns), slot.plan.shape[-2:], strict=True))
    return isinstance(gradient, Dense) and (2 * slot.rank + slot.momentum_rank) * (m + n) >= m * n


def compact(gradient: GradientOperator) -> GradientOperator:
    """The gradient without activations: they would be kept alive until `step()`."""
    return gradient if isinstance(gradient, Dense | Rows | Sketched) else as_dense(gradient)


def as_dense(gradient: GradientOperator) -> Dense:
    """The gradient with its entries in memory."""
    return gradient if isinstance(gradient, Dense) else Dense(gradient.matrix, is_owned=True)

"""A matrix of int8 codes with one scale for each group of a row: a tensor that torch's layers take for a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import ArgumentError
from .blocks import pieces

LARGEST = 127
# Tensors that a weight is made of.
PARTS = ("codes", "scales", "direction", "correction")
# Entries that exist in full precision at one time: 256 KiB in float32, or a part of a larger weight.
_BLOCK_NUMBERS = 2**16
# A scale is larger than its group asks for, so that updates have room: each new scale rounds all entries of its group once more.
_ROOM = 1 + 2**-4
# Of a group of zeros: far below any weight, so that the first update finds its own scale.
_SMALLEST = {torch.float16: 2.0**-24}


class Int8Weight(Tensor):
    """A weight (m, n) of codes and scales, `W = codes · scales + correction directionᵀ`, that looks like a floating tensor.

    The second part takes back what rounding of updates has added along one direction, that in which its layer's input is
    largest, and errors cost most. Products and lookups make a block of rows or columns in full precision at a time; backward
    gives an ordinary gradient. What else is computed with it takes an ordinary copy. Nothing writes into it but `copy_`, which
    rounds to nearest, and the engine, which rounds stochastically and keeps scales that still fit.

    Args:
        codes: int8, (m, n), −127 ... 127.
        scales: (m, ⌈n / group⌉), floating; its dtype is what the weight looks like.
        direction: (n, 1), of unit length or zero, in the dtype of the scales.
        correction: (m, 1), likewise.
        group: Entries of a row that share a scale; the last group of a row may be shorter.
        is_turned: Whether it stands for the transposed matrix.
    """

    codes: Tensor
    scales: Tensor
    direction: Tensor
    correction: Tensor
    group: int
    is_turned: bool

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, direction: Tensor, correction: Tensor, group: int, is_turned: bool = False
    ) -> Int8Weight:
        m, n = codes.shape
        form: dict[str, Any] = {"dtype": scales.dtype, "device": codes.device, "requires_grad": False}
        shape, strides = ((n, m), (1, n)) if is_turned else ((m, n), (n, 1))
        return Tensor._make_wrapper_subclass(cls, shape, strides=strides, **form)

    def __init__(
        self, codes: Tensor, scales: Tensor, direction: Tensor, correction: Tensor, group: int, is_turned: bool = False
    ) -> None:
        self.codes, self.scales, self.direction, self.correction = codes, scales, direction, correction
        self.group, self.is_turned = group, is_turned

    @classmethod
    def of(cls, weight: Tensor, group: int) -> Int8Weight:
        """A matrix (m, n), floating, rounded to nearest, a block of rows at a time."""
        weight, (m, n) = weight.detach(), weight.shape
        codes = torch.empty((m, n), dtype=torch.int8, device=weight.device)
        scales = torch.empty((m, -(-n // group)), dtype=weight.dtype, device=weight.device)
        for rows in _pieces(m, n):
            codes[rows], scales[rows] = quantized(weight[rows], group)
        return cls(codes, scales, scales.new_zeros(n, 1), scales.new_zeros(m, 1), group)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """An ordinary tensor with the same entries, new."""
        wide = times_scales(self.codes.to(dtype or self.dtype), self.scales, self.group)
        wide = wide.addmm(self.correction.to(wide.dtype), self.direction.to(wide.dtype).mT)
        return (wide.mT if self.is_turned else wide).contiguous()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, group={self.group}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(PARTS), (self.group, self.is_turned)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, *_: Any) -> Int8Weight:
        return Int8Weight(inner["codes"], inner["scales"], inner["direction"], inner["correction"], *meta)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _HANDLERS:
            return _HANDLERS[function](*args, **kwargs)
        if function._schema.is_mutable and isinstance(kwargs.get("out", args[0]), cls):
            raise ArgumentError(
                f"{function} would write into int8 weights, which only `attach` trains, and load_state_dict fills: call "
                "gradlr.dequantize_(model) first"
            )
        if function.namespace not in ("aten", "prim"):
            raise ArgumentError(f"{function} does not know int8 weights: call gradlr.dequantize_(model) first")
        return function(*_ordinary(args), **_ordinary(kwargs))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that it is made of, as `PARTS` names them."""
        return self.codes, self.scales, self.direction, self.correction

    def changed(self, make: Callable[[Tensor], Tensor] = lambda part: part) -> Int8Weight:
        """Another one of the same kind, of what is made of its parts."""
        codes, scales, direction, correction = map(make, self.parts())
        return Int8Weight(codes, scales, direction, correction, self.group, self.is_turned)


def stored_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors whose memory holds it: of int8 weights those that they are made of, of others itself."""
    return tensor.parts() if isinstance(tensor, Int8Weight) else (tensor,)


def _ordinary(tree: Any) -> Any:
    return tree_map_only(Int8Weight, Int8Weight.dequantized, tree)


def _pieces(count: int, width: int, multiple: int = 1) -> Iterator[slice]:
    return pieces(count, width, max(_BLOCK_NUMBERS, count * width // 32), multiple=multiple)


def _grouped(x: Tensor, group: int) -> Tensor:
    """(m, n) as (m, groups, group), zeros behind the last entry of a shorter group; a view where none is shorter."""
    short = -x.shape[-1] % group
    return (torch.nn.functional.pad(x, (0, short)) if short else x).unflatten(-1, (-1, group))


def _ungrouped(x: Tensor, columns: int) -> Tensor:
    return x.flatten(-2)[..., :columns]


def times_scales(x: Tensor, scales: Tensor, group: int) -> Tensor:
    """Entries (m, n) times their group's scale; x may be overwritten."""
    if x.shape[-1] % group == 0:
        x.unflatten(-1, (-1, group)).mul_(scales.to(x.dtype).unsqueeze(-1))
        return x
    return _ungrouped(_grouped(x, group) * scales.to(x.dtype).unsqueeze(-1), x.shape[-1])


def _scales_for(peaks: Tensor, dtype: torch.dtype) -> Tensor:
    return (peaks.float() * (_ROOM / LARGEST)).to(dtype).clamp(min=_SMALLEST.get(dtype, 2.0**-100))


def quantized(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of (m, n), floating: each group's largest entry gets about the largest code; rounded to nearest."""
    parts = _grouped(weight.float(), group)
    scales = _scales_for(parts.abs().amax(-1), weight.dtype)
    codes = (parts / scales.float().unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
    return _ungrouped(codes, weight.shape[-1]).to(torch.int8), scales


def subtracted(
    codes: Tensor,
    scales: Tensor,
    change: Tensor,
    group: int,
    *,
    decay: float | Tensor,
    generator: torch.Generator | None,
    is_mirrored: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of `decay · codes · scales − change`, rounded stochastically, so that the expected value is that.

    Scales stay what they are while their group fits: without a change and a decay of 1, every code stays as it is. A group that
    does not fit gets a larger one.

    Args:
        codes, scales: (m, n) and (m, groups).
        change: (m, n), float32 or wider; overwritten.
        group: Entries of a row that share a scale.
        decay: Factor on what they stand for.
        generator: Random numbers, on the device.
        is_mirrored: 1 − θ in the place of each random number θ. An entry that θ near its end lets step up may step down under
            1 − θ and no other: two writes with one state of the generator, the second mirrored, undo each other's steps where
            their changes have opposite signs.

    Returns:
        New codes, new scales, and what was added by rounding, (m, n), in the dtype of `change`.
    """
    whole, wide = _grouped(codes, group).to(change.dtype), scales.to(change.dtype).unsqueeze(-1)
    # In the code's units, and apart from the code: what is far below a unit is not lost beside it.
    step = _grouped(change, group).div_(wide).neg_()
    if isinstance(decay, Tensor) or decay != 1:
        step += whole * (decay - 1)
    peaks = (whole + step).abs_().amax(-1, keepdim=True)
    is_over = peaks > LARGEST
    larger = torch.where(is_over, _scales_for(peaks * wide, scales.dtype).to(wide.dtype), wide)
    # Of a group with a new scale code and step are one number, in its units.
    ratio = torch.where(is_over, wide / larger, 1.0)
    step.mul_(ratio).addcmul_(whole, ratio * is_over)
    below = step.floor()
    whole.mul_(~is_over).add_(below)
    above = step.sub_(below)
    del below
    draw = torch.rand(step.shape, dtype=step.dtype, device=step.device, generator=generator)
    is_up = (draw.neg_().add_(1) if is_mirrored else draw) < above
    del draw
    error = above.neg_().add_(is_up).mul_(larger)
    rounded = whole.add_(is_up).clamp_(-LARGEST, LARGEST)
    columns = codes.shape[-1]
    return _ungrouped(rounded, columns).to(torch.int8), larger.squeeze(-1).to(scales.dtype), _ungrouped(error, columns)


_ATEN = torch.ops.aten
_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_handles(_ATEN.detach.default, _ATEN.alias.default)
def _alias(weight: Int8Weight) -> Int8Weight:
    return weight.changed()


@_handles(_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)
def _view(weight: Int8Weight, shape: Any) -> Tensor:
    # autograd asks for a view of the same shape where it looks for the node of a leaf.
    return _alias(weight) if tuple(shape) == tuple(weight.shape) else weight.dequantized().reshape(shape)


@_handles(_ATEN.clone.default)
def _clone(weight: Int8Weight, **_: Any) -> Int8Weight:
    return weight.changed(Tensor.clone)


@_handles(_ATEN.t.default)
def _t(weight: Int8Weight) -> Int8Weight:
    return Int8Weight(*weight.parts(), weight.group, not weight.is_turned)


@_handles(_ATEN.transpose.int)
def _transpose(weight: Int8Weight, first: int, second: int) -> Int8Weight:
    return _alias(weight) if first % 2 == second % 2 else _t(weight)


@_handles(_ATEN.slice.Tensor)
def _slice(weight: Int8Weight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    if weight.is_turned or dim % 2:
        return _ATEN.slice.Tensor(weight.dequantized(), dim, start, end, step)
    codes, scales, correction = (
        _ATEN.slice.Tensor(part, 0, start, end, step) for part in (weight.codes, weight.scales, weight.correction)
    )
    return Int8Weight(codes, scales, weight.direction, correction, weight.group)


@_handles(_ATEN._to_copy.default)
def _to_copy(
    weight: Int8Weight, *, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> Tensor:
    if dtype is not None and not dtype.is_floating_point:
        return weight.dequantized().to(device=device, dtype=dtype)

    def moved(part: Tensor) -> Tensor:
        return part.to(device, dtype if part.is_floating_point() else None, non_blocking=non_blocking, copy=True)

    return weight.changed(moved)


@_handles(_ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.chunk.default)
def _split(weight: Int8Weight, *_: Any, **__: Any) -> Tensor:
    raise ArgumentError(
        "int8 weights cannot be split (fully_shard, parallelize_module): they are trained in one process so far. Shard a model "
        "with bfloat16 weights, or call gradlr.dequantize_(model) first"
    )


@_handles(_ATEN.copy_.default)
def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Int8Weight):
        return target.copy_(source.dequantized() if isinstance(source, Int8Weight) else source)
    if target.is_turned:
        raise ArgumentError("copy_: into the transposed of int8 weights; copy into the weights themselves")
    if not isinstance(source, Int8Weight) or source.group != target.group or source.is_turned:
        source = Int8Weight.of(_ordinary(source).to(target.device, target.dtype).expand(target.shape), target.group)
    for part, new in zip(target.parts(), source.parts(), strict=True):
        part.copy_(new)
    return target


@_handles(_ATEN.mm.default)
def _mm(left: Tensor, right: Tensor) -> Tensor:
    if isinstance(left, Int8Weight):
        return _mm(_ordinary(right).mT, left.t()).mT
    weight: Any = right
    (m, n), group, dtype = weight.codes.shape, weight.group, left.dtype
    out = left.new_empty((left.shape[0], weight.shape[1]))
    if weight.is_turned:  # x Wᵀ
        for rows in _pieces(m, n):
            block = times_scales(weight.codes[rows].to(dtype), weight.scales[rows], group)
            out[:, rows] = left @ block.mT
        return out.addmm_(left @ weight.direction.to(dtype), weight.correction.to(dtype).mT)
    for columns in _pieces(n, m, group):  # δ W
        scales = weight.scales[:, columns.start // group : -(-columns.stop // group)]
        out[:, columns] = left @ times_scales(weight.codes[:, columns].to(dtype), scales, group)
    return out.addmm_(left @ weight.correction.to(dtype), weight.direction.to(dtype).mT)


@_handles(_ATEN.addmm.default)
def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _mm(left, right).mul_(alpha).add_(bias, alpha=beta)


@_handles(_ATEN.embedding.default)
def _embedding(weight: Int8Weight, ids: Tensor, *_: Any) -> Tensor:
    flat = ids.reshape(-1)
    rows = times_scales(weight.codes[flat].to(weight.dtype), weight.scales[flat], weight.group)
    return rows.addmm(weight.correction[flat], weight.direction.mT).view(*ids.shape, -1)

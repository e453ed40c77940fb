"""What the device of a tensor means to whoever asks it something, and where a tensor's numbers lie."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor


class DeviceTraits(NamedTuple):
    """What gradlr has to know about a kind of device.

    Attributes:
        is_async: Whether the host runs ahead of it, so that reading a number makes the host wait.
        widest_float: The widest floating dtype that it computes in.
        has_half_products: Whether products of bfloat16 are faster there than those of float32.
        has_wide_sums: Whether `torch.mm` hands out the float32 sums of such a product.
        has_kernels: Whether `linalg.kernels` run there.
    """

    is_async: bool
    widest_float: torch.dtype
    has_half_products: bool = False
    has_wide_sums: bool = False
    has_kernels: bool = False


_SYNCHRONOUS = DeviceTraits(is_async=False, widest_float=torch.float64)
_UNKNOWN = DeviceTraits(is_async=True, widest_float=torch.float32)
_TRAITS = {
    "cpu": _SYNCHRONOUS,
    "meta": _SYNCHRONOUS,
    # ROCm's devices are called cuda as well. The sums come with torch 2.8.
    "cuda": DeviceTraits(
        is_async=True,
        widest_float=torch.float64,
        has_half_products=True,
        has_wide_sums=hasattr(torch.ops.aten.mm, "dtype"),
        has_kernels=importlib.util.find_spec("triton") is not None,
    ),
    "xpu": DeviceTraits(is_async=True, widest_float=torch.float64),
    "mps": DeviceTraits(is_async=True, widest_float=torch.float32),
}
# Kind of device → traits that count instead of its own: tests let the CPU count as asynchronous.
_OVERRIDES: dict[str, DeviceTraits] = {}


def device_traits(device: torch.device) -> DeviceTraits:
    """The traits of a device; one that nobody has described counts as asynchronous and computes in float32 at most.

    To support a new kind of device, add its line to the table above.
    """
    return _OVERRIDES.get(device.type) or _TRAITS.get(device.type, _UNKNOWN)


def is_async(tensor: Tensor) -> bool:
    """Whether reading the tensor would make the host wait for its device."""
    # As `device_traits`, which is a call more: this is asked several times for each gradient.
    kind = tensor.device.type
    return (_OVERRIDES.get(kind) or _TRAITS.get(kind, _UNKNOWN)).is_async


def has_kernels(tensor: Tensor) -> bool:
    """Whether `linalg.kernels` take it: float32 or bfloat16, on a device that they run on."""
    kind = tensor.device.type  # as in `is_async`
    is_device = (_OVERRIDES.get(kind) or _TRAITS.get(kind, _UNKNOWN)).has_kernels
    # A compiler makes its own kernels of the plain ways.
    return is_device and tensor.dtype in (torch.float32, torch.bfloat16) and not torch.compiler.is_compiling()


def widest(tensor: Tensor) -> Tensor:
    """The tensor in the widest floating dtype of its device, for sums that should not round: float64 where it has that."""
    return tensor.to(device_traits(tensor.device).widest_float)


class AsyncScalar:
    """Starts to copy a scalar, or a few, to the host at once and hands them out when asked.

    On an asynchronous device the copy goes to pinned memory behind what the stream has been given so far, and `read` waits for
    just that; on other devices there is nothing to wait for.

    Args:
        scalar: 0-dim tensor of any real dtype, or one with an axis; not kept.
    """

    def __init__(self, scalar: Tensor) -> None:
        # A copy where it is read late: what it was taken from may be overwritten by then.
        self._value, self._event = scalar.detach().clone() if is_async(scalar) else scalar.detach(), None
        if scalar.device.type == "cuda":
            self._value = torch.empty(scalar.shape, dtype=scalar.dtype, device="cpu", pin_memory=True)
            self._value.copy_(scalar.detach(), non_blocking=True)
            self._event = torch.cuda.current_stream(scalar.device).record_event()

    def read(self) -> float:
        """The value; NaN and infinity included, booleans as 0 and 1."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)

    def read_all(self) -> list[float]:
        """The values of a tensor with one axis."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.tolist()


class DtypeAndDevice(TypedDict):
    """Where numbers are made, as the keyword arguments of torch's factories."""

    dtype: torch.dtype
    device: torch.device


def compute_dtype_and_device(parameter: Tensor) -> DtypeAndDevice:
    """Dtype and device of state and arithmetic: float32 or the parameter's own float64, where the parameter lies."""
    return {"dtype": torch.float64 if parameter.dtype == torch.float64 else torch.float32, "device": parameter.device}


class RandomStreams:
    """One random generator per device, set anew for every seed, parameter and step: what is drawn depends on nothing else."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def at(self, device: torch.device, *numbers: int) -> torch.Generator:
        """The device's generator, at the beginning of the stream that the numbers (seed, parameter, step) name."""
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        return generator.manual_seed(mixed_seed(*numbers))


def mixed_seed(seed: int, index: int, step: int) -> int:
    """One 63-bit seed from three numbers (splitmix64), so that neighbouring steps and parameters draw unrelated numbers."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


# Kinds of devices that may round the factors of float32 products to ten bits, where their user has allowed TF32.
TF32_DEVICES = {"cuda"}
_MATMUL = torch.backends.cuda.matmul
# Two switches, which torch refuses to hear of at once: since 2.9 what the newer says counts, and it leaves the older alone.
_HAS_NEWER_SWITCH = hasattr(_MATMUL, "fp32_precision")


def allows_tf32() -> bool:
    """Whether the user has allowed TF32 in products of matrices, by whichever of torch's switches."""
    return _MATMUL.fp32_precision == "tf32" if _HAS_NEWER_SWITCH else _MATMUL.allow_tf32


# What the user has allowed, while it is off.
_suspended: str | None = None


@contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 are such meanwhile, and afterwards as the user wants them."""
    global _suspended
    _suspended = _MATMUL.fp32_precision if _HAS_NEWER_SWITCH else torch.get_float32_matmul_precision()
    try:
        with _precision("ieee" if _HAS_NEWER_SWITCH else "highest"):
            yield
    finally:
        _suspended = None


def like_the_model() -> AbstractContextManager[None]:
    """Within `without_tf32`, for what the model's own backward would have computed: as the user wants products."""
    return nullcontext() if _suspended is None else _precision(_suspended)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    if _HAS_NEWER_SWITCH:
        before, _MATMUL.fp32_precision = _MATMUL.fp32_precision, name
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        if _HAS_NEWER_SWITCH:
            _MATMUL.fp32_precision = before
        else:
            torch.set_float32_matmul_precision(before)


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast: products of sketches stay in float32 or wider, wherever the user calls backward or step."""
    return torch.autocast(device.type, enabled=False)


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in one storage; works for tensors without values too, which have no address."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, spread over the processes of a device mesh."""
    # By what it can do: importing DTensor takes half a second.
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process; the tensor itself where all of it does."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]  # a DTensor, see is_sharded

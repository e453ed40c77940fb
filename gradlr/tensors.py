"""A scalar that may still be on its way from the device: read later, without making the device wait."""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncScalar:
    """Starts to copy a scalar to the host at once and hands it out when asked.

    On CUDA the copy goes to pinned memory behind what the stream has been given so far, and `read` waits for just that; on
    other devices there is nothing to wait for.

    Args:
        scalar: 0-dim tensor of any real dtype; not kept.
    """

    def __init__(self, scalar: Tensor) -> None:
        self._value, self._event = scalar.detach(), None
        if scalar.is_cuda:
            self._value = torch.empty((), dtype=scalar.dtype, device="cpu", pin_memory=True)
            self._value.copy_(scalar.detach(), non_blocking=True)
            self._event = torch.cuda.current_stream(scalar.device).record_event()

    def read(self) -> float:
        """The value; NaN and infinity included, booleans as 0 and 1."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)

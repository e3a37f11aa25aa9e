"""The mode in which everything is computed, and the library's errors turned into ours."""

from types import TracebackType
from typing import Final

import torch

from conveyor_server.errors import DeviceOutOfMemory, EngineFailed

_HOST_ALLOCATOR: Final = "DefaultCPUAllocator"
"""Says in a RuntimeError that host memory is gone; the library has no class for that."""


class computing:
    """What happens inside happens on a device, and nothing of it is recorded for gradients.

    Raises:
        DeviceOutOfMemory, EngineFailed: In place of the library's own errors.
    """

    __slots__ = ("_device", "_mode")

    def __init__(self, device: torch.device) -> None:
        """`device` as it is to be named."""
        self._device = device
        self._mode = torch.inference_mode()

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._mode.__exit__(kind, error, traceback)
        if isinstance(error, torch.OutOfMemoryError):
            raise DeviceOutOfMemory(
                "the device has no memory left for this",
                limit="device memory",
                maximum=str(self._device),
            ) from error
        if isinstance(error, MemoryError) or _HOST_ALLOCATOR in str(error):
            raise DeviceOutOfMemory.of_host() from error
        if isinstance(error, RuntimeError):
            raise EngineFailed("the engine failed; nothing was applied") from error

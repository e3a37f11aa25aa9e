"""What an error of the library means, and the mode in which everything is computed.

    OUT_OF_MEMORY  the call needed more memory than there is: it fails, and the next one may succeed
    DEVICE_LOST    the device's context is dead: no later call can succeed, nor can it be told what
                   an earlier one wrote. Only a new process gets a new context
    FAILED         everything else: the call fails

CUDA reports the fault of a kernel at some later call, and from then on at every call. So an error
that is not known to leave the context alive is taken for its death.
"""

import enum
from collections.abc import Callable
from types import TracebackType
from typing import Final, TypeAlias

import torch

from conveyor_server.errors import DeviceOutOfMemory, EngineFailed

_HOST_MEMORY_TEXTS: Final = ("DefaultCPUAllocator", "bad_alloc")
"""Say in a RuntimeError that host memory is gone; the library has no class for that."""


class Failure(enum.Enum):
    """What an error of the library means."""

    OUT_OF_MEMORY = enum.auto()
    DEVICE_LOST = enum.auto()
    FAILED = enum.auto()


class DeviceLost(Exception):
    """The device's context is dead; whoever can end the process has not done so."""


LostHandler: TypeAlias = Callable[[RuntimeError], None]
"""Called with the error that says that the device is lost; a server ends its process there."""

_PREFIXES: Final = ("CUDA error: ", "CUDA driver error: ")
"""How torch begins what it passes on from CUDA."""
_MEMORY_CODES: Final = frozenset({2})
"""Of cudaError_t: cudaErrorMemoryAllocation."""
_MEMORY_TEXTS: Final = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_HARMLESS_CODES: Final = frozenset({1, 9, 98, 209, 701, 801, *range(900, 909)})
"""Calls that were refused before they reached the device.

Invalid value, configuration or function, no kernel for this device, too many resources for a
launch, not supported, and what a stream that is captured refuses.
"""
_HARMLESS_TEXTS: Final = (
    "invalid argument",
    "invalid configuration argument",
    "invalid device function",
    "no kernel image is available",
    "too many resources requested for launch",
    "operation not supported",
    "operation not permitted when stream is capturing",
    "CUBLAS_STATUS_INVALID_VALUE",
    "CUBLAS_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_ARCH_MISMATCH",
)


def classify(error: RuntimeError) -> Failure:
    """What an error that torch raised means."""
    if isinstance(error, torch.OutOfMemoryError):
        return Failure.OUT_OF_MEMORY
    text = str(error)
    from_cuda = text.startswith(_PREFIXES)
    if not from_cuda and not isinstance(error, torch.AcceleratorError):
        return Failure.FAILED
    code: object = getattr(error, "error_code", None)
    if code in _MEMORY_CODES or text.partition(": ")[2].startswith(_MEMORY_TEXTS):
        return Failure.OUT_OF_MEMORY
    if code in _HARMLESS_CODES or text.partition(": ")[2].startswith(_HARMLESS_TEXTS):
        return Failure.FAILED
    return Failure.DEVICE_LOST


def no_handler(_: RuntimeError) -> None:
    """A `LostHandler` that leaves it at the exception."""


def report_if_lost(error: RuntimeError, on_lost: LostHandler) -> None:
    """Calls the handler, which may not return, if the device is lost.

    Raises:
        DeviceLost: It is, and the handler returned.
    """
    if classify(error) is Failure.DEVICE_LOST:
        on_lost(error)
        raise DeviceLost(f"the device is lost: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says; torch adds advice for its own developers below."""
    return str(error).partition("\n")[0].strip()


def _says_host_memory(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in _HOST_MEMORY_TEXTS
    )


class computing:
    """What happens inside happens on a device, and nothing of it is recorded for gradients.

    Raises:
        DeviceOutOfMemory, EngineFailed: In place of the library's own errors.
        DeviceLost: See `report_if_lost`.
    """

    __slots__ = ("_device", "_mode", "_on_lost")

    def __init__(self, device: torch.device, on_lost: LostHandler = no_handler) -> None:
        """`device` as it is to be named."""
        self._device = device
        self._on_lost = on_lost
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
        if isinstance(error, MemoryError) or _says_host_memory(error):
            raise DeviceOutOfMemory("the server") from error
        if not isinstance(error, RuntimeError):
            return
        report_if_lost(error, self._on_lost)
        if classify(error) is Failure.OUT_OF_MEMORY:
            raise DeviceOutOfMemory(str(self._device)) from error
        raise EngineFailed(
            "the engine failed on this batch; nothing was applied, so send the request again"
        ) from error

"""The mode in which everything is computed, and the library's errors turned into ours."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from conveyor_server.errors import DeviceOutOfMemory, EngineFailed


@contextmanager
def computing(device: torch.device) -> Generator[None]:
    """What happens inside happens on `device`, and nothing of it is recorded for gradients.

    Raises:
        DeviceOutOfMemory, EngineFailed: In place of the library's own errors.
    """
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise DeviceOutOfMemory(
            "the device has no memory left for this",
            limit="device memory",
            maximum=str(device),
        ) from error
    except RuntimeError as error:
        raise EngineFailed("the engine failed; nothing was applied") from error

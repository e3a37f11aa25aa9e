"""What the device and the library are, for people."""

from dataclasses import dataclass

import torch

from conveyor_server.engine.devices import find_device


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One device as the library sees it."""

    device: str
    kind: str
    """cpu or cuda."""
    name: str
    torch_version: str
    cuda_version: str
    """Of the library's build; empty for a build without CUDA."""
    free_bytes: int
    """Of its own memory; 0 for a CPU, which has none."""
    total_bytes: int
    passed_over: str
    """Why `auto` does not take the CUDA device there is; empty if it does, or there is none."""


def about_device(name: str) -> DeviceReport:
    """Describes the device that `engine.device` chooses.

    Raises:
        DeviceError: There is no such device, or it cannot be used.
    """
    choice = find_device(name)
    device = choice.device
    free, total, called = 0, 0, torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        called = torch.cuda.get_device_name(device)
    return DeviceReport(
        device=str(device),
        kind=device.type,
        name=called,
        torch_version=torch.__version__,
        cuda_version=torch.version.cuda or "",
        free_bytes=free,
        total_bytes=total,
        passed_over=choice.passed_over,
    )

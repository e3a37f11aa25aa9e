"""Which device the arithmetic runs on.

`auto` takes the first CUDA device if it can be used, and says why where it cannot: its compute
capability is one that this build of torch has kernels for, and a trial product on it is right.
`auto` measures nothing. Which device is faster depends on how many sessions are stepped at once,
which only the operator knows; `conveyor-server doctor` measures both.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from conveyor_server.engine.failures import first_line

TRIAL_ROWS: Final = 32
TRIAL_SIZE: Final = 64
CUBLAS_WORKSPACE: Final = ":4096:8"
"""Eight workspaces of 4 MiB for each stream.

With it cuBLAS gives the same bits in every run, whatever other streams do. It is read when CUDA
starts; a value that the environment has already is left as it is.
"""
_ARCHITECTURE: Final = re.compile(r"(sm|compute)_(\d+)(\d)[af]?")
_log = logging.getLogger(__name__)


class DeviceError(Exception):
    """The configured device is not there, or cannot be used."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A device, and why it is not another one."""

    device: torch.device
    passed_over: str = ""
    """Why `auto` does not take the CUDA device that there is."""


def choose_device(name: str) -> torch.device:
    """`find_device`, with a line in the log if `auto` passes a CUDA device over.

    Raises:
        DeviceError: See `find_device`.
    """
    choice = find_device(name)
    if choice.passed_over:
        _log.warning(
            "the CUDA device cannot be used; the CPU is",
            extra={"setting": "engine.device", "problem": choice.passed_over},
        )
    return choice.device


def find_device(name: str) -> Choice:
    """Turns `auto | cpu | cuda | cuda:N` into a device.

    Raises:
        DeviceError: There is no such device, or it cannot be used.
    """
    if name == "cpu":
        return Choice(torch.device("cpu"))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        if not count:
            return Choice(torch.device("cpu"))
        device = torch.device("cuda", 0)
        problem = problem_of(device)
        return Choice(device) if not problem else Choice(torch.device("cpu"), problem)
    device = torch.device("cuda", torch.device(name).index or 0)
    if (device.index or 0) >= count:
        raise DeviceError(f"engine.device: {name} is not there; CUDA devices found: {count}")
    if problem := problem_of(device):
        raise DeviceError(f"engine.device: {name} cannot be used: {problem}")
    return Choice(device)


def problem_of(device: torch.device) -> str:
    """Why a CUDA device cannot be used; empty if it can."""
    try:
        capability = torch.cuda.get_device_capability(device)
        built_for = torch.cuda.get_arch_list()
        if built_for and not has_kernels(capability, built_for):
            return (
                f"its compute capability is {capability[0]}.{capability[1]}, and this build of"
                f" torch has kernels for {', '.join(built_for)}"
            )
        if trial(device) != TRIAL_ROWS * TRIAL_SIZE * TRIAL_SIZE:
            return "a trial product gave a wrong result"
    except RuntimeError as error:
        return f"a trial product failed: {first_line(error)}"
    return ""


def has_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a device of such a capability runs any of these architectures.

    Machine code (sm_XY) runs on devices of its own X and at least its Y, intermediate code
    (compute_XY) on every later one.
    """
    for each in built_for:
        if found := _ARCHITECTURE.fullmatch(each):
            kind, needed = found[1], (int(found[2]), int(found[3]))
            if capability >= needed and (kind == "compute" or capability[0] == needed[0]):
                return True
    return False


def trial(device: torch.device) -> float:
    """The sum over a product of ones, which no format rounds."""
    ones = torch.ones(TRIAL_ROWS, TRIAL_SIZE, device=device)
    return float((ones @ torch.ones(TRIAL_SIZE, TRIAL_SIZE, device=device)).sum())

"""Which device is taken, and what is said where it is not the one that is there."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from conveyor_server.engine import devices
from conveyor_server.engine.about import about_device
from conveyor_server.engine.devices import (
    DeviceError,
    choose_device,
    find_device,
    has_kernels,
    trial,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BUILT_FOR = ["sm_75", "sm_80", "sm_90", "compute_90"]
RIGHT = trial(CPU)


def _fake_cuda(
    monkeypatch: pytest.MonkeyPatch,
    *,
    count: int = 1,
    capability: tuple[int, int] = (9, 0),
    product: float | RuntimeError = RIGHT,
) -> None:
    """So many devices, of such a capability, and what a trial product on them gives."""

    def tried(_: torch.device) -> float:
        if isinstance(product, RuntimeError):
            raise product
        return product

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILT_FOR)
    monkeypatch.setattr(devices, "trial", tried)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_auto_takes_a_cuda_device_that_can_be_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _fake_cuda(monkeypatch)
    assert choose_device("auto") == choose_device("cuda") == choose_device("cuda:0") == CUDA
    assert choose_device("cpu") == CPU
    assert not caplog.records


def test_auto_takes_the_cpu_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _fake_cuda(monkeypatch, count=0)
    assert choose_device("auto") == CPU
    assert not caplog.records


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ({"capability": (6, 1)}, "compute capability is 6.1"),
        ({"product": 0.0}, "wrong result"),
        ({"product": torch.OutOfMemoryError("CUDA out of memory.\nmore")}, "CUDA out of memory.$"),
        ({"product": torch.AcceleratorError("CUDA error: no kernel image")}, "no kernel image"),
    ],
    ids=["too old", "wrong", "full", "no kernel"],
)
def test_a_cuda_device_that_cannot_be_used_is_passed_over_aloud(
    fault: dict[str, object],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _fake_cuda(monkeypatch, **fault)  # type: ignore[arg-type]
    assert choose_device("auto") == CPU
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.__dict__["setting"] == "engine.device"
    with pytest.raises(DeviceError, match=f"cuda cannot be used: .*{problem}"):
        choose_device("cuda")
    assert about_device("auto").passed_over == record.__dict__["problem"]


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_cuda(monkeypatch, count=2)
    assert find_device("cuda:1").device == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="cuda:2 is not there; CUDA devices found: 2"):
        find_device("cuda:2")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), True), ((8, 6), True), ((9, 0), True), ((7, 0), False), ((10, 0), True)],
)
def test_machine_code_runs_within_its_generation_and_other_code_later(
    capability: tuple[int, int], runs: bool
) -> None:
    assert has_kernels(capability, BUILT_FOR) == runs


def test_machine_code_for_one_chip_runs_on_no_later_generation() -> None:
    assert has_kernels((9, 0), ["sm_90a"])
    assert not has_kernels((10, 0), ["sm_75", "sm_90a"])
    assert has_kernels((12, 1), ["sm_120"])


def test_the_trial_is_right_on_a_cpu() -> None:
    assert RIGHT == 131_072.0


def test_cublas_gets_workspaces_of_its_own_before_cuda_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str | None] = []
    _fake_cuda(monkeypatch)
    monkeypatch.setattr(
        torch.cuda,
        "device_count",
        lambda: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")) or 1,
    )
    find_device("auto")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    find_device("cuda")
    assert seen == [":4096:8", ":16:8"]

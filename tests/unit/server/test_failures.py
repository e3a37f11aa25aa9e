"""What an error of torch means, and what the engine makes of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from conveyor_models import ModelSpec
from conveyor_server.core import ModelKey
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.failures import DeviceLost, Failure, classify, computing
from conveyor_server.engine.port import Work
from conveyor_server.engine.prediction import SequenceRunner
from conveyor_server.engine.runner import ModelRunner
from conveyor_server.engine.state_pool import StatePool
from conveyor_server.errors import DeviceOutOfMemory, EngineFailed
from tests.fidelity.networks import (
    CPU,
    make_bundle,
    make_spec,
    random_memory,
    random_rows,
    random_weights,
)

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`"


def _accelerator_error(text: str, code: int | None = None) -> RuntimeError:
    """As torch makes it: the code of cudaError_t is an attribute."""
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OUT_OF_MEMORY"),
        (_accelerator_error("CUDA error: out of memory"), "OUT_OF_MEMORY"),
        (_accelerator_error("CUDA error: memory allocation", 2), "OUT_OF_MEMORY"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "OUT_OF_MEMORY",
        ),
        (RuntimeError("CUDA driver error: out of memory"), "OUT_OF_MEMORY"),
        (_accelerator_error(ILLEGAL), "DEVICE_LOST"),
        (_accelerator_error("a text of a later torch", 700), "DEVICE_LOST"),
        (RuntimeError(ILLEGAL), "DEVICE_LOST"),
        (_accelerator_error("CUDA error: device-side assert triggered", 710), "DEVICE_LOST"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "DEVICE_LOST"),
        (RuntimeError("CUDA error: unspecified launch failure"), "DEVICE_LOST"),
        (RuntimeError("CUDA error: unknown error"), "DEVICE_LOST"),
        (RuntimeError("CUDA driver error: device is lost"), "DEVICE_LOST"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
            "DEVICE_LOST",
        ),
        (_accelerator_error("CUDA error: invalid configuration argument", 9), "FAILED"),
        (RuntimeError("CUDA error: invalid argument"), "FAILED"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "FAILED"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasSgemm`"),
            "FAILED",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"), "FAILED"),
        (RuntimeError("what a user calls CUDA error: out of memory"), "FAILED"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_each_error_is_of_one_kind(error: RuntimeError, expected: str) -> None:
    assert classify(error) is Failure[expected]


def test_a_lost_device_is_reported_before_anything_is_raised() -> None:
    reported: list[RuntimeError] = []
    error = _accelerator_error(ILLEGAL)
    lost = pytest.raises(DeviceLost, match=r"illegal memory access was encountered$")
    with lost, computing(CPU, reported.append):
        raise error
    assert reported == [error]
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_accelerator_error("CUDA error: out of memory"), DeviceOutOfMemory),
        (_accelerator_error("CUDA error: invalid argument"), EngineFailed),
        (ValueError("of ours"), ValueError),
    ],
)
def test_any_other_error_reports_nothing(error: Exception, expected: type[Exception]) -> None:
    reported: list[RuntimeError] = []
    with pytest.raises(expected), computing(CPU, reported.append):
        raise error
    assert not reported


# --- every way into the engine ---

KEY = ModelKey("random", 1)
STREAMED = make_spec([5], features=2, attention={"memory_size": 3, "size": 4})
PREDICTED = make_spec([{"size": 5, "direction": "reverse"}], features=2)


def _engine(spec: ModelSpec) -> tuple[TorchEngine, list[RuntimeError]]:
    reported: list[RuntimeError] = []
    engine = TorchEngine(CPU, cpu_threads=1, slots=4, on_lost=reported.append)
    engine.add(KEY, engine.prepare(make_bundle(spec, random_weights(spec, 0))))
    return engine, reported


def _run(engine: TorchEngine) -> None:
    memory = engine.add_memory(KEY, random_memory(STREAMED, 2, 0).tobytes())
    slot = engine.acquire(KEY)
    assert slot is not None
    engine.run(KEY, [Work(slot, 1, random_rows(STREAMED, 1, 0).tobytes(), 1, memory)])


def _predict(engine: TorchEngine) -> None:
    engine.predict(KEY, random_rows(PREDICTED, 3, 0).tobytes(), 3, 3).advance(10)


WAYS: dict[str, tuple[ModelSpec, object, str, Callable[[TorchEngine], object]]] = {
    "run": (STREAMED, ModelRunner, "run", _run),
    "the writes of a batch": (STREAMED, ModelRunner, "_await_device", _run),
    "acquire": (STREAMED, StatePool, "acquire", lambda engine: engine.acquire(KEY)),
    "release": (STREAMED, StatePool, "release", lambda engine: engine.release(KEY, 1)),
    "reset": (STREAMED, StatePool, "reset", lambda engine: engine.reset(KEY, 1)),
    "read": (STREAMED, StatePool, "read", lambda engine: engine.read(KEY, 1)),
    "write": (STREAMED, StatePool, "write", lambda engine: engine.write(KEY, 1, b"")),
    "memories": (STREAMED, torch, "frombuffer", lambda engine: engine.add_memory(KEY, bytes(12))),
    "a slice": (PREDICTED, SequenceRunner, "_pass", _predict),
    "the beginning of a sequence": (PREDICTED, torch, "frombuffer", _predict),
    "a model that is loaded": (
        STREAMED,
        ModelRunner,
        "__init__",
        lambda engine: engine.prepare(make_bundle(STREAMED, random_weights(STREAMED, 0))),
    ),
    "a probe": (
        PREDICTED,
        SequenceRunner,
        "_pass",
        lambda engine: engine.prepare(make_bundle(PREDICTED, random_weights(PREDICTED, 0))),
    ),
    "its memory": (STREAMED, torch.cuda, "mem_get_info", TorchEngine.device_memory),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_is_asked_of_a_lost_device_reports_it(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, owner, name, ask = WAYS[way]
    engine, reported = _engine(spec)
    error = _accelerator_error(ILLEGAL)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(DeviceLost):
        ask(engine)
    assert reported == [error]


def test_memory_that_runs_out_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, reported = _engine(STREAMED)

    def fail(*_: object) -> None:
        raise _accelerator_error("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "_inputs", fail)
        with pytest.raises(DeviceOutOfMemory):
            _run(engine)
    _run(engine)
    assert not reported


# --- the end of a batch ---


def test_a_batch_is_answered_only_after_its_writes_are_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []

    def noted(name: str, method: Callable[..., object], *args: object) -> object:
        happened.append(name)
        return method(*args)

    engine, _ = _engine(STREAMED)
    for owner, name in (
        (ModelRunner, "_split"),
        (StatePool, "scatter"),
        (ModelRunner, "_await_device"),
    ):
        method = getattr(owner, name)
        # A partial is no method, so it is wrapped once more.
        made = partial(noted, name, method)
        monkeypatch.setattr(owner, name, lambda *args, made=made: made(*args))
    _run(engine)
    assert happened == ["_split", "scatter", "_await_device"]

"""The engine on a CUDA device: the same suite as on the CPU, and what only a device can do.

`scripts/gpu_check.sh` runs them on a machine that has such a device and little else. So nothing
here needs grpc, numba or the network, and whatever runs on the CPU beside it takes plain products.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch

from conveyor_models import ModelSpec, load_bundle
from conveyor_server.core import TraceMode
from conveyor_server.engine.devices import DeviceError, choose_device
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.port import Done, Work
from conveyor_server.engine.probe import same_bits, same_bits_in_batches
from conveyor_server.engine.products import BlockedFamily
from conveyor_server.engine.runner import ModelRunner
from conveyor_server.errors import DeviceOutOfMemory
from tests.fidelity import reference
from tests.fidelity.cases import (
    FAMILIES,
    MEMORY_ROWS,
    PREDICTED,
    STEPS,
    STREAMED,
    TOLERANCE_FLOAT32,
)
from tests.fidelity.networks import (
    Loaded,
    Rows,
    load,
    make_bundle,
    make_spec,
    random_memory,
    random_rows,
    random_weights,
)
from tests.fidelity.same_bits import holds, holds_in_slices
from tests.fidelity.test_failures import STACKS
from tests.fidelity.traced import parts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="there is no CUDA device: torch.cuda.is_available() is False",
    ),
]
DEVICE: Final = torch.device("cuda", 0)
TOLERANCE: Final = 3 * TOLERANCE_FLOAT32
"""Sums are taken in another order than on the CPU, and exp is another one. TF32 keeps 10 bits, and
would show from a hundred times as much."""
ZOO: Final = Path(__file__).parents[2] / "models" / "zoo"
SPEC: Final = make_spec([17, (33, 9)], features=3, head=5, activation="softmax")


def _loaded(spec: ModelSpec = SPEC, slots: int = 16) -> Loaded:
    return load(make_bundle(spec, random_weights(spec, 0)), slots=slots, device=DEVICE)


# --- fidelity ---


def _memories(spec: ModelSpec, sessions: int) -> list[Rows | None]:
    if spec.attention is None:
        return [None] * sessions
    return [random_memory(spec, MEMORY_ROWS[-1 - n % 4], n) for n in range(sessions)]


@pytest.mark.parametrize("spec", STREAMED.values(), ids=STREAMED.keys())
def test_the_engine_computes_the_equations(spec: ModelSpec) -> None:
    weights = random_weights(spec, 0)
    inputs = [random_rows(spec, steps, steps) for steps in (STEPS, 1, 17, 400)]
    memories = _memories(spec, len(inputs))
    outputs = load(make_bundle(spec, weights), device=DEVICE).run_batch(inputs, memories)
    for rows, memory, out in zip(inputs, memories, outputs, strict=True):
        expected = reference.run(spec, weights, rows, memory)
        assert reference.error(out, expected) < TOLERANCE


@pytest.mark.parametrize("spec", PREDICTED.values(), ids=PREDICTED.keys())
def test_a_whole_sequence_computes_the_equations(spec: ModelSpec) -> None:
    weights = random_weights(spec, 0)
    rows = random_rows(spec, STEPS, 0)
    out = load(make_bundle(spec, weights), device=DEVICE).predict(rows)
    assert reference.error(out, reference.run(spec, weights, rows)) < TOLERANCE


@pytest.mark.parametrize("spec", STREAMED.values(), ids=STREAMED.keys())
def test_a_trace_shows_what_the_equations_say(spec: ModelSpec) -> None:
    weights = random_weights(spec, 0)
    inputs = [random_rows(spec, steps, steps) for steps in (100, 1, 17)]
    memories = _memories(spec, len(inputs))
    loaded = load(make_bundle(spec, weights), device=DEVICE)
    traced = loaded.run_works(inputs, memories, TraceMode.FULL)
    for rows, memory, done in zip(inputs, memories, traced, strict=True):
        followed = reference.follow(spec, weights, rows, memory)
        seen = parts_of(done.trace)
        if followed.attention is not None:
            weighed = seen.pop("attention")
            assert reference.error(weighed, followed.attention) < TOLERANCE
        for name, values in seen.items():
            number, gate = name.split(".")
            expected = followed.layers[int(number)][gate]
            assert reference.error(values, expected) < TOLERANCE, name


@pytest.mark.parametrize("name", ["letters", "temperature"])
def test_a_shipped_model_computes_the_equations(name: str) -> None:
    bundle = load_bundle(ZOO / name)
    rows = random_rows(bundle.spec, STEPS, 0)
    (out,) = load(bundle, device=DEVICE).run_batch([rows])
    expected = reference.run(bundle.spec, bundle.weights, rows)
    assert reference.error(out, expected) < TOLERANCE


def test_a_carry_goes_from_device_to_cpu_and_back() -> None:
    weights = random_weights(SPEC, 0)
    rows = random_rows(SPEC, 60, 0)
    here, there = load(make_bundle(SPEC, weights), family=BlockedFamily()), _loaded()
    outs: list[np.ndarray] = []
    carry = bytes(here.runner.pool.carry_bytes)
    for turn, loaded in enumerate((there, here, there)):
        slot = loaded.acquire()
        loaded.engine.write(loaded.key, slot, carry)
        outs.append(loaded.run(slot, rows[20 * turn : 20 * turn + 20]))
        carry = loaded.engine.read(loaded.key, slot)
    expected = reference.run(SPEC, weights, rows)
    assert reference.error(np.concatenate(outs), expected) < TOLERANCE


# --- same bits ---


def test_bits_depend_on_the_session_alone() -> None:
    holds(BlockedFamily, examples=60, device=DEVICE)


def test_whole_sequences_have_the_same_bits_in_any_slices() -> None:
    holds_in_slices(BlockedFamily, examples=40, device=DEVICE)


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES.keys())
def test_one_session_in_256_keeps_its_bits(options: dict[str, object]) -> None:
    spec = make_spec([{**options, "size": 65}], features=9)
    loaded = _loaded(spec, slots=256)
    inputs = [random_rows(spec, 3, number) for number in range(256)]
    together = loaded.run_batch(inputs)
    for number in (0, 1, 31, 32, 100, 255):
        assert np.array_equal(loaded.run_batch([inputs[number]])[0], together[number])


@pytest.mark.parametrize("name", ["letters", "temperature"])
def test_a_shipped_model_keeps_its_bits(name: str) -> None:
    bundle = load_bundle(ZOO / name)
    loaded = load(bundle, slots=256, device=DEVICE)
    assert same_bits(loaded.runner, bundle.spec)
    assert same_bits_in_batches(loaded.runner, bundle.spec, 256)
    inputs = [random_rows(bundle.spec, 1 + number % 9, number) for number in range(45)]
    for rows, out in zip(inputs, loaded.run_batch(inputs), strict=True):
        assert np.array_equal(loaded.run_batch([rows])[0], out)


@pytest.mark.parametrize("activation", ["softmax", "log_softmax"])
@pytest.mark.parametrize("classes", [1_025, 9_217, 9_218, 9_220, 20_001])
def test_a_row_over_many_classes_does_not_depend_on_its_place(
    classes: int, activation: str
) -> None:
    # The library's kernel begins at the first aligned address of a row.
    spec = make_spec([17], features=3, head=classes, activation=activation)
    loaded = _loaded(spec, slots=40)
    rows = random_rows(spec, 1, 0)
    together = loaded.run_batch([rows] * 35)
    assert len({out.tobytes() for out in together}) == 1
    (alone,) = loaded.run_batch([rows])
    assert np.array_equal(alone, together[0])
    expected = reference.run(spec, random_weights(spec, 0), rows)
    assert reference.error(alone, expected) < TOLERANCE


def test_every_run_has_the_same_bits() -> None:
    spec = make_spec([512, 512], features=100)
    inputs = [random_rows(spec, 20, number) for number in range(48)]
    loaded = _loaded(spec, slots=48)
    first = loaded.run_batch(inputs)
    for _ in range(3):
        for once, again in zip(first, loaded.run_batch(inputs), strict=True):
            assert np.array_equal(once, again)


# --- the pool ---


def test_a_slot_is_scrubbed_and_nobody_elses_is_touched() -> None:
    loaded = _loaded(slots=3)
    slots = [loaded.acquire() for _ in range(3)]
    for slot in slots:
        loaded.run(slot, random_rows(SPEC, 4, slot))
    carries = {slot: loaded.engine.read(loaded.key, slot) for slot in slots}
    assert all(any(carry) for carry in carries.values())
    loaded.engine.release(loaded.key, slots[1])
    assert loaded.engine.slots_used(loaded.key) == 2
    assert loaded.acquire() == slots[1]
    assert not any(loaded.engine.read(loaded.key, slots[1]))
    for slot in (slots[0], slots[2]):
        assert loaded.engine.read(loaded.key, slot) == carries[slot]
    loaded.engine.write(loaded.key, slots[1], carries[slots[0]])
    assert loaded.engine.read(loaded.key, slots[1]) == carries[slots[0]]
    loaded.runner.pool.allocator.check()
    assert all(part.device == DEVICE for part in loaded.runner.pool.parts)


def test_padding_columns_and_the_dummy_slot_stay_zero() -> None:
    loaded = _loaded()
    loaded.run_batch([random_rows(SPEC, steps, steps) for steps in (3, 1, 4, 1, 5)])
    sizes = [size for layer in SPEC.layers for size in (layer.output_size, layer.size)]
    for part, size in zip(loaded.runner.pool.parts, sizes, strict=True):
        assert not part[0].any()
        assert not part[:, size:].any()


@pytest.mark.parametrize("spec", STACKS.values(), ids=STACKS.keys())
def test_a_carry_that_turns_non_finite_harms_nobody_else(spec: ModelSpec) -> None:
    calm, poisoned = _loaded(spec), _loaded(spec)
    outcomes = list[list[tuple[Done, bytes]]]()
    for loaded in (calm, poisoned):
        slots = [loaded.acquire() for _ in range(5)]
        if loaded is poisoned:
            values = np.full(loaded.runner.pool.carry_bytes // 4, np.nan, np.float32)
            loaded.engine.write(loaded.key, slots[2], values.tobytes())
        works = [
            Work(slot, 3, random_rows(spec, 3, slot).tobytes(), 3, loaded.add_memory(memory))
            for slot, memory in zip(slots, _memories(spec, 5), strict=True)
        ]
        done = loaded.engine.run(loaded.key, works)
        assert [each.finite for each in done] == [n != 2 or loaded is calm for n in range(5)]
        carries = [loaded.engine.read(loaded.key, slot) for slot in slots]
        outcomes.append(list(zip(done, carries, strict=True)))
    for number in (0, 1, 3, 4):
        assert outcomes[0][number] == outcomes[1][number]


def test_memories_are_kept_on_the_device() -> None:
    spec = STACKS["attention"]
    loaded = _loaded(spec)
    rows = [random_memory(spec, length, length) for length in (1, 32, 33)]
    numbers = [loaded.add_memory(each) for each in rows]
    for number, each in zip(numbers, rows, strict=True):
        assert loaded.runner.memories[number].rows.device == DEVICE
        kept = loaded.runner.memories[number].rows[: len(each), : each.shape[1]]
        assert kept.cpu().numpy().tobytes() == each.tobytes()


# --- out of memory ---


def test_a_device_without_memory_fails_the_batch_and_no_carry() -> None:
    spec = make_spec([512], features=512)
    loaded = _loaded(spec)
    slots = [loaded.acquire() for _ in range(2)]
    for slot in slots:
        loaded.run(slot, random_rows(spec, 3, slot))
    before = [loaded.engine.read(loaded.key, slot) for slot in slots]
    steps = 60_000  # half a gigabyte of gates
    works = [Work(slot, steps, np.zeros((steps, 512), np.float32).tobytes(), 0) for slot in slots]
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info(DEVICE)
    allowed = (torch.cuda.memory_reserved(DEVICE) + 64 * 2**20) / total
    torch.cuda.set_per_process_memory_fraction(allowed, DEVICE)
    try:
        with pytest.raises(DeviceOutOfMemory):
            loaded.engine.run(loaded.key, works)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert [loaded.engine.read(loaded.key, slot) for slot in slots] == before
    control = _loaded(spec)
    slot = control.acquire()
    control.run(slot, random_rows(spec, 3, slots[0]))
    rows = random_rows(spec, 5, 9)
    assert np.array_equal(loaded.run(slots[0], rows), control.run(slot, rows))


@pytest.mark.parametrize("part", ["_inputs", "_run_layers", "_outputs", "_split"])
def test_memory_that_runs_out_anywhere_changes_no_carry(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    loaded = _loaded()
    slot = loaded.acquire()
    loaded.run(slot, random_rows(SPEC, 3, 0))
    before = loaded.engine.read(loaded.key, slot)
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, part, fail)
        with pytest.raises(DeviceOutOfMemory):
            loaded.run(slot, random_rows(SPEC, 3, 1))
    assert loaded.engine.read(loaded.key, slot) == before


# --- a device that is lost ---

LOST: Final = """
import torch
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.failures import DeviceLost, computing
from conveyor_server.engine.port import Work
from conveyor_server.core import ModelKey
from conveyor_server.engine.state_pool import StatePool
from tests.fidelity.networks import make_bundle, make_spec, random_weights

device = torch.device("cuda", 0)
beyond = torch.tensor([10_000], device=device)

def lost(error):
    print("lost:", str(error).splitlines()[0], flush=True)

def by_a_kernel():
    with computing(device, lost):
        torch.zeros(4, device=device)[beyond].cpu()

def by_the_write_of_a_batch():
    spec = make_spec([5], features=2)
    engine = TorchEngine(device, cpu_threads=1, slots=4, on_lost=lost)
    key = ModelKey("random", 1)
    engine.add(key, engine.prepare(make_bundle(spec, random_weights(spec, 0))))
    slot = engine.acquire(key)
    StatePool.scatter = lambda self, slots, rows: self.parts[0].index_copy_(0, beyond, rows[0])
    engine.run(key, [Work(slot, 1, bytes(8), 1)])
    print("answered", flush=True)

try:
    {how}()
except DeviceLost:
    print("raised", flush=True)
"""


@pytest.mark.parametrize("how", ["by_a_kernel", "by_the_write_of_a_batch"])
def test_a_kernel_that_faults_loses_the_device_before_anything_is_answered(how: str) -> None:
    # In a process of its own, as nothing can be computed in it any more.
    done = subprocess.run(
        [sys.executable, "-c", LOST.replace("{how}", how)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    lines = done.stdout.splitlines()
    assert lines[-1:] == ["raised"], done.stdout + done.stderr
    assert lines[0].startswith("lost: CUDA error"), done.stdout + done.stderr
    assert "answered" not in lines


# --- the device itself ---


def test_products_are_float32_not_tf32() -> None:
    TorchEngine(DEVICE, cpu_threads=1, slots=1)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    found = (a.to(DEVICE) @ b.to(DEVICE)).cpu().double()
    assert float((found - exact).norm() / exact.norm()) < 5e-6


def test_devices_are_chosen_by_name() -> None:
    assert choose_device("auto") == DEVICE
    assert choose_device("cuda") == DEVICE
    assert choose_device("cuda:0") == DEVICE
    with pytest.raises(DeviceError, match="cuda:63"):
        choose_device("cuda:63")


def test_the_devices_memory_is_measured() -> None:
    engine = TorchEngine(DEVICE, cpu_threads=1, slots=4)
    memory = dict(engine.device_memory())
    _, total = torch.cuda.mem_get_info(DEVICE)
    assert set(memory) == {("used",), ("free",)}
    assert sum(memory.values()) == total

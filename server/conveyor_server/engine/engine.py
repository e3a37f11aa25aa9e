"""The engine: a runner for each loaded model version."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import torch

from conveyor_models import Bundle
from conveyor_server.core import ModelKey
from conveyor_server.engine.failures import (
    LostHandler,
    computing,
    no_handler,
    report_if_lost,
)
from conveyor_server.engine.lone import CompiledFamily
from conveyor_server.engine.port import Done, Prediction, Work
from conveyor_server.engine.prediction import SequenceRunner
from conveyor_server.engine.probe import same_bits, same_bits_in_batches, same_bits_in_slices
from conveyor_server.engine.products import BlockedFamily, PrepackedFamily, ProductFamily
from conveyor_server.engine.runner import ModelRunner

Runner: TypeAlias = ModelRunner | SequenceRunner
"""A model, packed for a device."""

_log = logging.getLogger(__name__)


class SameBitsError(Exception):
    """No kernels on this machine keep a model's bits independent of the batch."""


class TorchEngine:
    """Implements `port.Engine` with torch, on one device."""

    def __init__(
        self,
        device: torch.device,
        *,
        cpu_threads: int,
        slots: int,
        batch_sessions_max: int | None = None,
        verify_same_bits: bool = True,
        on_lost: LostHandler = no_handler,
    ) -> None:
        """An engine without a model.

        Args:
            device: From `devices.choose_device`.
            cpu_threads: For each call.
            slots: For each model version.
            batch_sessions_max: The largest batch that will be run; None: as many as `slots`.
            verify_same_bits: Whether models are probed at load.
            on_lost: Called, on any thread, when the device can never be used again.
        """
        self.device = device
        self._batch_sessions_max = batch_sessions_max or slots
        self._on_lost = on_lost
        self._guard = partial(computing, device, on_lost)
        self._slots = slots
        self._cpu_threads = cpu_threads
        self._verify = verify_same_bits
        self._runners: dict[ModelKey, ModelRunner] = {}
        self._sequences: dict[ModelKey, SequenceRunner] = {}
        """Of the models that cannot be streamed."""
        torch.set_num_threads(cpu_threads)
        # Reduced-precision products would be faster and would not be float32.
        torch.backends.cuda.matmul.allow_tf32 = False

    @property
    def fastest_kernels(self) -> str:
        """The name of those that are tried first on this machine."""
        return self._families()[0].name

    def prepare(self, bundle: Bundle) -> Runner:
        """Packs a bundle; takes a while, and may be called from any thread.

        Raises:
            SameBitsError: The promise cannot be kept on this machine.
            DeviceLost: See `report_if_lost`.
        """
        families = self._families()
        with torch.inference_mode():
            for family in families:
                try:
                    runner, kept = self._try(bundle, family)
                except RuntimeError as error:
                    report_if_lost(error, self._on_lost)
                    raise
                if kept:
                    return runner
                _log.warning(
                    "kernels change bits with the batch; trying slower ones",
                    extra={"model": bundle.spec.name, "kernels": family.name},
                )
        names = ", ".join(family.name for family in families)
        raise SameBitsError(f"{bundle.spec.name}: rows depend on the batch with {names}")

    def _try(self, bundle: Bundle, family: ProductFamily) -> tuple[Runner, bool]:
        """A runner with such products, and whether it keeps the promise."""
        spec = bundle.spec
        if spec.streamable:
            runner = ModelRunner(bundle, self._slots, self.device, family)
            return runner, not self._verify or (
                same_bits(runner, spec)
                and same_bits_in_batches(runner, spec, self._batch_sessions_max)
            )
        runner = SequenceRunner(bundle, self.device, family, self._guard)
        return runner, not self._verify or same_bits_in_slices(runner, spec)

    def add(self, key: ModelKey, runner: Runner) -> None:
        """Makes a prepared model runnable."""
        assert key not in self._runners, key
        assert key not in self._sequences, key
        if isinstance(runner, ModelRunner):
            self._runners[key] = runner
        else:
            self._sequences[key] = runner

    def remove(self, key: ModelKey) -> None:
        """Drops a model; none of its slots is in use."""
        assert self.slots_used(key) == 0, key
        self._runners.pop(key, None)
        self._sequences.pop(key, None)

    def run(self, key: ModelKey, works: Sequence[Work]) -> list[Done]:
        """See `Engine.run`."""
        with self._guard():
            return self._runners[key].run(works)

    def predict(self, key: ModelKey, rows: bytes, length: int, outputs: int) -> Prediction:
        """See `Engine.predict`."""
        return self._sequences[key].begin(rows, length, outputs)

    def acquire(self, key: ModelKey) -> int | None:
        """See `Engine.acquire`."""
        with self._guard():
            return self._runners[key].pool.acquire()

    def release(self, key: ModelKey, slot: int) -> None:
        """See `Engine.release`."""
        with self._guard():
            self._runners[key].pool.release(slot)

    def reset(self, key: ModelKey, slot: int) -> None:
        """See `Engine.reset`."""
        with self._guard():
            self._runners[key].pool.reset(slot)

    def read(self, key: ModelKey, slot: int) -> bytes:
        """See `Engine.read`."""
        with self._guard():
            return self._runners[key].pool.read(slot)

    def write(self, key: ModelKey, slot: int, carry: bytes) -> None:
        """See `Engine.write`."""
        with self._guard():
            self._runners[key].pool.write(slot, carry)

    def add_memory(self, key: ModelKey, rows: bytes) -> int:
        """See `Engine.add_memory`."""
        with self._guard():
            return self._runners[key].memories.add(rows)

    def drop_memory(self, key: ModelKey, memory: int) -> None:
        """See `Engine.drop_memory`."""
        self._runners[key].memories.drop(memory)

    def slots_used(self, key: ModelKey) -> int:
        """See `Engine.slots_used`."""
        return 0 if key in self._sequences else self._runners[key].pool.allocator.used

    def slots_total(self, key: ModelKey) -> int:
        """See `Engine.slots_total`."""
        return 0 if key in self._sequences else self._runners[key].pool.allocator.total

    def device_memory(self) -> list[tuple[tuple[str, ...], float]]:
        """Bytes of the CUDA device's memory by state, for metrics."""
        try:
            free, total = torch.cuda.mem_get_info(self.device)
        except RuntimeError as error:
            report_if_lost(error, self._on_lost)
            raise
        return [(("used",), total - free), (("free",), free)]

    def _families(self) -> list[ProductFamily]:
        families: list[ProductFamily] = []
        if self.device.type == "cpu" and CompiledFamily.available():
            families.append(CompiledFamily(self._cpu_threads))
        if self.device.type == "cpu" and PrepackedFamily.available():
            families.append(PrepackedFamily(self._cpu_threads))
        return [*families, BlockedFamily()]

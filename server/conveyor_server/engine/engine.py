"""The engine: a runner for each loaded model version."""

import logging
from collections.abc import Sequence
from typing import TypeAlias

import torch

from conveyor_models import Bundle
from conveyor_server.core import ModelKey
from conveyor_server.engine.failures import computing
from conveyor_server.engine.lone import CompiledFamily
from conveyor_server.engine.port import Done, Prediction, Work
from conveyor_server.engine.prediction import SequenceRunner
from conveyor_server.engine.probe import same_bits, same_bits_in_slices
from conveyor_server.engine.products import BlockedFamily, PrepackedFamily, ProductFamily
from conveyor_server.engine.runner import ModelRunner

Runner: TypeAlias = ModelRunner | SequenceRunner
"""A model, packed for a device."""

_log = logging.getLogger(__name__)


class DeviceError(Exception):
    """The configured device is not there."""


class SameBitsError(Exception):
    """No kernels on this machine keep a model's bits independent of the batch."""


def choose_device(name: str) -> torch.device:
    """Turns `auto | cpu | cuda | cuda:N` into a device.

    Raises:
        DeviceError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda", device.index or 0)
        if (device.index or 0) >= count:
            raise DeviceError(
                f"engine.device: {name} not found; torch sees {count} CUDA devices here"
            )
    return device


class TorchEngine:
    """Implements `port.Engine` with torch, on one device."""

    def __init__(
        self, device: torch.device, *, cpu_threads: int, slots: int, verify_same_bits: bool = True
    ) -> None:
        """`slots` for each model version."""
        self.device = device
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
        """
        families = self._families()
        with torch.inference_mode():
            for family in families:
                runner, kept = self._try(bundle, family)
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
            return runner, not self._verify or same_bits(runner, spec)
        runner = SequenceRunner(bundle, self.device, family)
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
        with computing(self.device):
            return self._runners[key].run(works)

    def predict(self, key: ModelKey, rows: bytes, length: int, outputs: int) -> Prediction:
        """See `Engine.predict`."""
        return self._sequences[key].begin(rows, length, outputs)

    def acquire(self, key: ModelKey) -> int | None:
        """See `Engine.acquire`."""
        with computing(self.device):
            return self._runners[key].pool.acquire()

    def release(self, key: ModelKey, slot: int) -> None:
        """See `Engine.release`."""
        with computing(self.device):
            self._runners[key].pool.release(slot)

    def reset(self, key: ModelKey, slot: int) -> None:
        """See `Engine.reset`."""
        with computing(self.device):
            self._runners[key].pool.reset(slot)

    def read(self, key: ModelKey, slot: int) -> bytes:
        """See `Engine.read`."""
        with computing(self.device):
            return self._runners[key].pool.read(slot)

    def write(self, key: ModelKey, slot: int, carry: bytes) -> None:
        """See `Engine.write`."""
        with computing(self.device):
            self._runners[key].pool.write(slot, carry)

    def add_memory(self, key: ModelKey, rows: bytes) -> int:
        """See `Engine.add_memory`."""
        with computing(self.device):
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
        free, total = torch.cuda.mem_get_info(self.device)
        return [(("used",), total - free), (("free",), free)]

    def _families(self) -> list[ProductFamily]:
        families: list[ProductFamily] = []
        if self.device.type == "cpu" and CompiledFamily.available():
            families.append(CompiledFamily(self._cpu_threads))
        if self.device.type == "cpu" and PrepackedFamily.available():
            families.append(PrepackedFamily(self._cpu_threads))
        return [*families, BlockedFamily()]

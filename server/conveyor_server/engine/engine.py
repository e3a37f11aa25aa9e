"""The engine: a runner for each loaded model version."""

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

from conveyor_models import Bundle
from conveyor_server.core import ModelKey
from conveyor_server.engine.port import Done, Work
from conveyor_server.engine.probe import same_bits
from conveyor_server.engine.products import BlockedFamily, PrepackedFamily, ProductFamily
from conveyor_server.engine.runner import ModelRunner
from conveyor_server.errors import DeviceOutOfMemory, EngineFailed

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
            raise DeviceError(f"engine.device: {name} is not there; CUDA devices found: {count}")
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
        torch.set_num_threads(cpu_threads)
        # Reduced-precision products would be faster and would not be float32.
        torch.backends.cuda.matmul.allow_tf32 = False

    def prepare(self, bundle: Bundle) -> ModelRunner:
        """Packs a bundle; takes a while, and may be called from any thread.

        Raises:
            SameBitsError: The promise cannot be kept on this machine.
        """
        families = self._families()
        for family in families:
            runner = ModelRunner(bundle, self._slots, self.device, family)
            if not self._verify or same_bits(runner, bundle.spec):
                return runner
            _log.warning(
                "kernels change bits with the batch; trying slower ones",
                extra={"model": bundle.spec.name, "kernels": family.name},
            )
        names = ", ".join(family.name for family in families)
        raise SameBitsError(f"{bundle.spec.name}: rows depend on the batch with {names}")

    def add(self, key: ModelKey, runner: ModelRunner) -> None:
        """Makes a prepared model runnable."""
        assert key not in self._runners, key
        self._runners[key] = runner

    def remove(self, key: ModelKey) -> None:
        """Drops a model; none of its slots is in use."""
        assert self.slots_used(key) == 0, key
        del self._runners[key]

    def run(self, key: ModelKey, works: Sequence[Work]) -> list[Done]:
        """See `Engine.run`."""
        with self._errors():
            return self._runners[key].run(works)

    def acquire(self, key: ModelKey) -> int | None:
        """See `Engine.acquire`."""
        return self._runners[key].pool.acquire()

    def release(self, key: ModelKey, slot: int) -> None:
        """See `Engine.release`."""
        with self._errors():
            self._runners[key].pool.release(slot)

    def reset(self, key: ModelKey, slot: int) -> None:
        """See `Engine.reset`."""
        with self._errors():
            self._runners[key].pool.reset(slot)

    def read(self, key: ModelKey, slot: int) -> bytes:
        """See `Engine.read`."""
        with self._errors():
            return self._runners[key].pool.read(slot)

    def write(self, key: ModelKey, slot: int, carry: bytes) -> None:
        """See `Engine.write`."""
        with self._errors():
            self._runners[key].pool.write(slot, carry)

    def add_memory(self, key: ModelKey, rows: bytes) -> int:
        """See `Engine.add_memory`."""
        with self._errors():
            return self._runners[key].memories.add(rows)

    def read_memory(self, key: ModelKey, memory: int) -> bytes:
        """See `Engine.read_memory`."""
        with self._errors():
            return self._runners[key].memories.read(memory)

    def drop_memory(self, key: ModelKey, memory: int) -> None:
        """See `Engine.drop_memory`."""
        self._runners[key].memories.drop(memory)

    def slots_used(self, key: ModelKey) -> int:
        """See `Engine.slots_used`."""
        return self._runners[key].pool.allocator.used

    def slots_total(self, key: ModelKey) -> int:
        """See `Engine.slots_total`."""
        return self._runners[key].pool.allocator.total

    def device_memory(self) -> list[tuple[tuple[str, ...], float]]:
        """Bytes of the CUDA device's memory by state, for metrics."""
        free, total = torch.cuda.mem_get_info(self.device)
        return [(("used",), total - free), (("free",), free)]

    @contextmanager
    def _errors(self) -> Generator[None]:
        """Turns the library's errors into ours."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceOutOfMemory(
                "the device has no memory left for this",
                limit="device memory",
                maximum=str(self.device),
            ) from error
        except RuntimeError as error:
            raise EngineFailed("the engine failed; nothing was applied") from error

    def _families(self) -> list[ProductFamily]:
        if self.device.type == "cpu" and PrepackedFamily.available():
            return [PrepackedFamily(self._cpu_threads), BlockedFamily()]
        return [BlockedFamily()]

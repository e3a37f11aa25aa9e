"""Random networks, inputs for them, and an engine with one of them loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from conveyor_models import Bundle, ModelSpec, digest_of
from conveyor_models.layers import RnnLayer
from conveyor_server.core import ModelKey, TraceMode
from conveyor_server.engine.engine import Runner, TorchEngine
from conveyor_server.engine.lone import CompiledFamily
from conveyor_server.engine.port import Done, Work
from conveyor_server.engine.prediction import SequenceRunner
from conveyor_server.engine.products import BlockedFamily, PrepackedFamily, ProductFamily
from conveyor_server.engine.runner import ModelRunner

CPU = torch.device("cpu")
Rows = npt.NDArray[Any]
LayerLike: TypeAlias = int | tuple[int, int] | Mapping[str, Any]
"""A size, a size and what it is projected to, or the keys of a `[[layers]]` table."""


def families(threads: int) -> list[ProductFamily]:
    """The kinds of products there are on a CPU, the slowest first; without those torch lacks."""
    found: list[ProductFamily] = [BlockedFamily()]
    if PrepackedFamily.available():
        found.append(PrepackedFamily(threads))
    if CompiledFamily.available():
        found.append(CompiledFamily(threads))
    return found


def make_spec(
    layers: Sequence[LayerLike],
    *,
    features: int = 0,
    tokens: int = 0,
    embedding: int = 0,
    attention: Mapping[str, Any] | None = None,
    head: int = 0,
    head_bias: bool = True,
    activation: str = "none",
) -> ModelSpec:
    """A structure. The layers are LSTMs where they do not say otherwise."""
    assert bool(features) != bool(tokens)
    tables: dict[str, Any] = {
        "schema": 1,
        "name": "random",
        "input": {"kind": "tokens" if tokens else "features", "size": tokens or features},
        "layers": [_layer(layer) for layer in layers],
        "output": {"activation": activation},
    }
    if tokens:
        tables["embedding"] = {"size": embedding}
    if attention:
        tables["attention"] = dict(attention)
    if head:
        tables["head"] = {"size": head, "bias": head_bias}
    return ModelSpec.model_validate(tables)


def _layer(layer: LayerLike) -> dict[str, Any]:
    match layer:
        case int():
            return {"cell": "lstm", "size": layer}
        case (size, projection):
            return {"cell": "lstm", "size": size, "projection": projection}
        case _:
            return {"cell": "lstm"} | dict(layer)


def random_weights(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Normal, matrix rows of about unit length: gates are neither idle nor saturated."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in spec.weight_shapes.items():
        scale = 1.0 if len(shape) == 1 or name == "embedding.weight" else shape[1] ** -0.5
        if name == "attention.score":
            scale = 3.0 * shape[0] ** -0.5  # no row is looked at alone
        if ".peephole_" in name:
            scale = 0.5  # a forget gate that follows its own c closely never forgets
        weights[name] = scale * torch.randn(shape, generator=generator)
    for number, layer in enumerate(spec.layers):
        if isinstance(layer, RnnLayer) and layer.nonlinearity == "relu":
            for prefix in layer.directions:  # nothing else holds its state
                recurrent = weights[f"layers.{number}.{prefix}weight_recurrent"]
                recurrent.mul_(min(1.0, 0.95 / float(torch.linalg.matrix_norm(recurrent, 2))))
    return weights


def make_bundle(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Bundle:
    """A bundle that was never on a disk."""
    held = dict(weights)
    return Bundle(spec, MappingProxyType(held), digest_of(spec, held), Path("nowhere"))


def random_rows(spec: ModelSpec, steps: int, seed: int) -> Rows:
    """Tokens [T] or features [T, F]."""
    random = np.random.default_rng(seed)
    if spec.vocabulary_size is not None:
        return random.integers(0, spec.vocabulary_size, steps, dtype=np.int32)
    return random.standard_normal((steps, spec.input_size), dtype=np.float32)


def random_memory(spec: ModelSpec, rows: int, seed: int) -> Rows:
    """What a session attends over, [M, A]."""
    assert spec.attention is not None
    random = np.random.default_rng((seed, rows))  # unlike those of the input
    return random.standard_normal((rows, spec.attention.memory_size), dtype=np.float32)


def exact_outputs(bundle: Bundle, rows: Rows, memory: Rows | None = None) -> Rows:
    """What the readable network gives for one session, in float64, [T, O]."""
    network = bundle.network(torch.float64)
    x = torch.from_numpy(rows)[:, None]  # [T, 1] or [T, 1, F]
    if not bundle.spec.streamable:
        return network.predict(x)[:, 0].numpy()
    held = None if memory is None else network.memory(torch.from_numpy(memory)[None])
    return network.run(x, memory=held)[1][:, 0].numpy()


@dataclass(frozen=True)
class Loaded:
    """An engine that runs one model."""

    engine: TorchEngine
    key: ModelKey
    prepared: Runner
    spec: ModelSpec

    @property
    def runner(self) -> ModelRunner:
        """Of a model that can be streamed."""
        assert isinstance(self.prepared, ModelRunner)
        return self.prepared

    def acquire(self) -> int:
        slot = self.engine.acquire(self.key)
        assert slot is not None
        return slot

    def add_memory(self, memory: Rows | None) -> int:
        """The number of a memory; 0 for a model without attention."""
        return 0 if memory is None else self.engine.add_memory(self.key, memory.tobytes())

    def unpack(self, rows: bytes) -> npt.NDArray[np.float32]:
        """[T, O]"""
        return np.frombuffer(rows, dtype=np.float32).reshape(-1, self.spec.output_size)

    def run(self, slot: int, rows: Rows, memory: int = 0) -> npt.NDArray[np.float32]:
        """All outputs of some steps of one session [T, O]."""
        work = Work(slot, len(rows), rows.tobytes(), len(rows), memory)
        (done,) = self.engine.run(self.key, [work])
        assert done.finite
        return self.unpack(done.rows)

    def run_batch(
        self,
        inputs: Sequence[Rows],
        memories: Sequence[Rows | None] | None = None,
        trace: TraceMode = TraceMode.NONE,
    ) -> list[npt.NDArray[np.float32]]:
        """All outputs of new sessions that run together."""
        return [self.unpack(each.rows) for each in self.run_works(inputs, memories, trace)]

    def run_works(
        self,
        inputs: Sequence[Rows],
        memories: Sequence[Rows | None] | None = None,
        trace: TraceMode = TraceMode.NONE,
    ) -> list[Done]:
        """All that becomes of new sessions that run together."""
        slots = [self.acquire() for _ in inputs]
        numbers = [self.add_memory(each) for each in memories or [None] * len(inputs)]
        works = [
            Work(slot, len(rows), rows.tobytes(), len(rows), number, trace)
            for slot, rows, number in zip(slots, inputs, numbers, strict=True)
        ]
        done = self.engine.run(self.key, works)
        for slot, number in zip(slots, numbers, strict=True):
            self.engine.release(self.key, slot)
            if number:
                self.engine.drop_memory(self.key, number)
        return done

    def predict(self, rows: Rows, steps_max: int = 1_000_000) -> npt.NDArray[np.float32]:
        """All outputs of a whole sequence, so many steps at a time [T, O]."""
        prediction = self.engine.predict(self.key, rows.tobytes(), len(rows), len(rows))
        while (done := prediction.advance(steps_max)) is None:
            pass
        return self.unpack(done)


def load(
    bundle: Bundle,
    *,
    family: ProductFamily | None = None,
    slots: int = 16,
    device: torch.device = CPU,
    threads: int = 1,
) -> Loaded:
    """Loads a bundle as the server does, or with the given kind of products and no probe."""
    engine = TorchEngine(device, cpu_threads=threads, slots=slots)
    key = ModelKey(bundle.spec.name, bundle.spec.version)
    if family is None:
        runner = engine.prepare(bundle)
    elif bundle.spec.streamable:
        runner = ModelRunner(bundle, slots, device, family)
    else:
        runner = SequenceRunner(bundle, device, family)
    engine.add(key, runner)
    return Loaded(engine, key, runner, bundle.spec)

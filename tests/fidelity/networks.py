"""Random networks, inputs for them, and an engine with one of them loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from conveyor_models import Bundle, ModelSpec, digest_of
from conveyor_server.core import ModelKey
from conveyor_server.engine.engine import TorchEngine
from conveyor_server.engine.lone import CompiledFamily
from conveyor_server.engine.port import Work
from conveyor_server.engine.products import BlockedFamily, PrepackedFamily, ProductFamily
from conveyor_server.engine.runner import ModelRunner

CPU = torch.device("cpu")
Floats = npt.NDArray[np.floating[Any]]


def families(threads: int) -> list[ProductFamily]:
    """The kinds of products there are on a CPU, the slowest first; without those torch lacks."""
    found: list[ProductFamily] = [BlockedFamily()]
    if PrepackedFamily.available():
        found.append(PrepackedFamily(threads))
    if CompiledFamily.available():
        found.append(CompiledFamily(threads))
    return found


def make_spec(
    layers: Sequence[int | tuple[int, int]],
    *,
    features: int = 0,
    tokens: int = 0,
    embedding: int = 0,
    head: int = 0,
    head_bias: bool = True,
    activation: str = "none",
) -> ModelSpec:
    """A structure. A layer is its size, or its size and what it is projected to."""
    assert bool(features) != bool(tokens)
    tables: dict[str, Any] = {
        "schema": 1,
        "name": "random",
        "input": {"kind": "tokens" if tokens else "features", "size": tokens or features},
        "layers": [
            {"cell": "lstm", "size": layer}
            if isinstance(layer, int)
            else {"cell": "lstm", "size": layer[0], "projection": layer[1]}
            for layer in layers
        ],
        "output": {"activation": activation},
    }
    if tokens:
        tables["embedding"] = {"size": embedding}
    if head:
        tables["head"] = {"size": head, "bias": head_bias}
    return ModelSpec.model_validate(tables)


def random_weights(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Normal, each row of about unit length, so that gates are neither idle nor saturated."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in spec.weight_shapes.items():
        scale = 1.0 if len(shape) == 1 or name == "embedding.weight" else shape[1] ** -0.5
        weights[name] = scale * torch.randn(shape, generator=generator)
    return weights


def make_bundle(spec: ModelSpec, weights: Mapping[str, Tensor]) -> Bundle:
    """A bundle that was never on a disk."""
    held = dict(weights)
    return Bundle(spec, MappingProxyType(held), digest_of(spec, held), Path("nowhere"))


def random_rows(spec: ModelSpec, steps: int, seed: int) -> npt.NDArray[Any]:
    """Tokens [T] or features [T, F]."""
    random = np.random.default_rng(seed)
    if spec.vocabulary_size is not None:
        return random.integers(0, spec.vocabulary_size, steps, dtype=np.int32)
    return random.standard_normal((steps, spec.input_size), dtype=np.float32)


@dataclass(frozen=True)
class Loaded:
    """An engine that runs one model."""

    engine: TorchEngine
    key: ModelKey
    runner: ModelRunner
    spec: ModelSpec

    def acquire(self) -> int:
        slot = self.engine.acquire(self.key)
        assert slot is not None
        return slot

    def run(self, slot: int, rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """All outputs of some steps of one session [T, O]."""
        work = Work(slot, len(rows), rows.tobytes(), len(rows))
        (done,) = self.engine.run(self.key, [work])
        assert done.finite
        return np.frombuffer(done.rows, dtype=np.float32).reshape(len(rows), -1)

    def run_batch(self, inputs: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        """All outputs of new sessions that run together."""
        slots = [self.acquire() for _ in inputs]
        works = [
            Work(slot, len(rows), rows.tobytes(), len(rows))
            for slot, rows in zip(slots, inputs, strict=True)
        ]
        done = self.engine.run(self.key, works)
        for slot in slots:
            self.engine.release(self.key, slot)
        return [
            np.frombuffer(each.rows, dtype=np.float32).reshape(len(rows), -1)
            for each, rows in zip(done, inputs, strict=True)
        ]


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
    else:
        runner = ModelRunner(bundle, slots, device, family)
    engine.add(key, runner)
    return Loaded(engine, key, runner, bundle.spec)

"""Small bundles for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from conveyor_models import ModelSpec, parse_spec

TOKENS_TOML = """
schema = 1
name = "tiny"

[input]
kind = "tokens"
size = 5
labels = ["a", "b", "\\n", "\\u007f", "é"]

[embedding]
size = 3

[[layers]]
cell = "lstm"
size = 4
projection = 2

[[layers]]
cell = "lstm"
size = 7

[head]
size = 5

[output]
activation = "log_softmax"
"""

FEATURES_TOML = """
schema = 1
name = "plain"

[input]
kind = "features"
size = 2

[[layers]]
cell = "lstm"
size = 3
"""


def tokens_spec() -> ModelSpec:
    return parse_spec(TOKENS_TOML)


def features_spec() -> ModelSpec:
    return parse_spec(FEATURES_TOML)


def random_weights(spec: ModelSpec, seed: int = 0, scale: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: scale * torch.randn(shape, generator=generator)
        for name, shape in spec.weight_shapes.items()
    }


def counted_weights(spec: ModelSpec) -> dict[str, Tensor]:
    """Weights that depend on no random generator."""
    return {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) / 64
        for name, shape in spec.weight_shapes.items()
    }

"""A repository of small models, one for each thing a test needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from conveyor_models import Bundle, ModelSpec, save_bundle

TINY: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 3},
    "layers": [{"cell": "lstm", "size": 5}],
    "head": {"size": 2},
}
"""Features in, two numbers out."""
DEEP: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 4},
    "layers": [{"cell": "lstm", "size": 33, "projection": 17}, {"cell": "lstm", "size": 9}],
    "head": {"size": 3},
    "output": {"activation": "sigmoid"},
}
WORDS: Final[dict[str, Any]] = {
    "input": {"kind": "tokens", "size": 7},
    "embedding": {"size": 4},
    "layers": [{"cell": "lstm", "size": 17}],
    "head": {"size": 7},
    "output": {"activation": "log_softmax"},
}
"""Tokens in, log-probabilities of the next one out."""
SPOKEN: Final[dict[str, Any]] = {
    **WORDS,
    "input": {
        **WORDS["input"],
        "labels": ["null", "eins", "zwei", "drei", "vier", "funf", "sechs"],
    },
}
"""The same with a label for each token."""
LOOP: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 2},
    "layers": [{"cell": "lstm", "size": 6}],
    "head": {"size": 2},
}
"""Features whose output can be the next input."""
SHORT: Final[dict[str, Any]] = {**TINY, "limits": {"chunk_steps_max": 8}}
"""Takes short chunks only."""
SINGLE: Final[dict[str, Any]] = {**TINY, "limits": {"chunk_steps_max": 1}}
"""Takes one step at a time."""
HEAVY: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 8},
    "layers": [{"cell": "lstm", "size": 512}, {"cell": "lstm", "size": 512}],
    "head": {"size": 1},
}
"""Slow enough that something can happen while it runs."""
BROAD: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 1},
    "layers": [{"cell": "lstm", "size": 8}],
    "head": {"size": 4096},
}
"""16 KiB of output for 4 bytes of input."""
EXPLOSIVE: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 1},
    "layers": [{"cell": "lstm", "size": 8, "projection": 1}],
}
"""Its h overflows float32 after some inputs of 1000; an input of 0 leaves it at zero."""
PLUS_ONE: Final[dict[str, Any]] = {
    "input": {"kind": "features", "size": 1},
    "layers": [{"cell": "rnn", "nonlinearity": "relu", "size": 4}],
    "head": {"size": 1, "bias": False},
}
"""Puts out its input, plus 1 at the first step, exactly."""

MODELS: Final[dict[str, dict[str, Any]]] = {
    "tiny": TINY,
    "deep": DEEP,
    "words": WORDS,
    "spoken": SPOKEN,
    "loop": LOOP,
    "short": SHORT,
    "single": SINGLE,
    "heavy": HEAVY,
    "broad": BROAD,
}


def make_spec(name: str, tables: dict[str, Any], version: int = 1) -> ModelSpec:
    return ModelSpec.model_validate({"schema": 1, "name": name, "version": version, **tables})


def add_model(
    repository: Path,
    name: str,
    tables: dict[str, Any],
    *,
    version: int | None = None,
    seed: int = 0,
) -> Bundle:
    """Writes NAME/ or, given a version, NAME/VERSION/."""
    spec = make_spec(name, tables, version or 1)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        for key, shape in spec.weight_shapes.items()
    }
    folder = repository / name if version is None else repository / name / str(version)
    return save_bundle(folder, spec, weights)


def add_explosive(repository: Path) -> Bundle:
    spec = make_spec("explosive", EXPLOSIVE)
    weights = {key: torch.zeros(shape) for key, shape in spec.weight_shapes.items()}
    weights["layers.0.weight_input"][16:24] = 0.01  # the candidate follows the input
    weights["layers.0.bias"][8:16] = 10.0  # and nothing is forgotten
    weights["layers.0.weight_projection"][:] = 1e38
    return save_bundle(repository / "explosive", spec, weights)


def add_plus_one(repository: Path) -> Bundle:
    """Units: x and -x where positive, 1 once a step was taken, 1 where none was taken before."""
    spec = make_spec("plus-one", PLUS_ONE)
    weights = {key: torch.zeros(shape) for key, shape in spec.weight_shapes.items()}
    weights["layers.0.weight_input"][:, 0] = torch.tensor([1.0, -1.0, 0.0, 0.0])
    weights["layers.0.bias"][2:] = 1.0
    weights["layers.0.weight_recurrent"][3, 2] = -1.0
    weights["head.weight"][0] = torch.tensor([1.0, -1.0, 0.0, 1.0])
    return save_bundle(repository / "plus-one", spec, weights)


def add_all(repository: Path) -> dict[str, Bundle]:
    bundles = {name: add_model(repository, name, tables) for name, tables in MODELS.items()}
    bundles["explosive"] = add_explosive(repository)
    bundles["plus-one"] = add_plus_one(repository)
    return bundles

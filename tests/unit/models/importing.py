"""What the tests of importers share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conveyor_models import Network
from conveyor_models.importers import ImportedModel, ImportOptions, import_model

FLOAT32_ERROR_MAX = 2e-6
"""Of one float32 implementation against another, over some dozens of steps."""


def network_of(model: ImportedModel, dtype: torch.dtype = torch.float32) -> Network:
    """What was understood, as it would run from a bundle."""
    return Network(model.spec("imported"), model.weights, dtype)


def rows_of(model: ImportedModel, x: Tensor) -> np.ndarray[Any, Any]:
    """All output rows; x [T, B, F] or tokens [T, B]."""
    return network_of(model).predict(x).numpy()


def error(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    assert found.shape == expected.shape
    off = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(off / np.linalg.norm(expected.astype(np.float64)))


def fill(module: nn.Module, seed: int = 0) -> None:
    """Weights of a size at which every gate matters; biases too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for each in module.parameters():
            each.copy_(0.5 * torch.randn_like(each))


def import_state(
    state: Mapping[str, Any], folder: Path, options: ImportOptions | None = None
) -> ImportedModel:
    """Through a .pt file."""
    file = folder / "state.pt"
    torch.save(state, file)
    return import_model(file, options or ImportOptions())

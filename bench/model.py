"""The model that is measured: one LSTM layer of 256 on 256 features, random weights, fixed seed.

A row is 1 KiB in and 1 KiB out.
"""

from pathlib import Path
from typing import Final

MODEL: Final = "bench"
SIZE: Final = 256
_SEED: Final = 20250101
_SPEC: Final = f"""
schema = 1
name = "{MODEL}"

[input]
kind = "features"
size = {SIZE}

[[layers]]
cell = "lstm"
size = {SIZE}
"""


def write_model(repository: Path) -> Path:
    """Writes the bundle into a model repository and returns the bundle's folder."""
    import torch  # the load generator needs the names above and no torch

    from conveyor_models import parse_spec, save_bundle

    spec = parse_spec(_SPEC)
    generator = torch.Generator().manual_seed(_SEED)
    bound = SIZE**-0.5  # what torch.nn.LSTM starts from
    weights = {
        name: torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for name, shape in spec.weight_shapes.items()
    }
    return save_bundle(repository / MODEL, spec, weights).path

"""Trains `temperature` from the series in `data.py` and writes it as a bundle.

    python models/zoo/temperature/train.py --out DIR

The network learns in normalised units; on export the normalisation is folded into the weights, so
that the bundle reads and writes degrees Fahrenheit.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import data
import numpy as np
import torch
from torch import Tensor, nn

from conveyor_models import Bundle, ModelSpec, save_bundle, weights_from_torch

SEED = 2010
THREADS = 1
SIZE = 64
PROJECTION = 24
WINDOW_STEPS = 96
WARM_UP_STEPS = 26
"""An empty carry has not seen yesterday: its first forecasts are not trained on, nor scored."""
BATCH = 32
ITERATIONS = 12_000
LEARNING_RATE = 1e-2
GRADIENT_NORM_MAX = 1.0
CENTRE_F = 52.0
SCALE_F = 10.0
OFFSET_F = 4.0
STRETCH = 0.2
"""How far each window is shifted and stretched at random: a year of two stations is little."""

SPEC = ModelSpec.model_validate(
    {
        "schema": 1,
        "name": "temperature",
        "description": "Air temperature in 1, 6 and 24 hours, from the hours so far. Trained on"
        " hourly series of Seattle and San Francisco, degrees Fahrenheit.",
        "input": {"kind": "features", "size": len(data.FEATURES), "labels": data.FEATURES},
        "layers": [{"cell": "lstm", "size": SIZE, "projection": PROJECTION}],
        "head": {"size": len(data.TARGETS)},
        "output": {"labels": data.TARGETS},
    }
)


class Forecaster(nn.Module):
    """The network in normalised units."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(len(data.FEATURES), SIZE, proj_size=PROJECTION)
        self.head = nn.Linear(PROJECTION, len(data.TARGETS))
        nn.init.ones_(self.lstm.bias_ih_l0.data[SIZE : 2 * SIZE])  # begin by not forgetting

    def forward(self, x: Tensor) -> Tensor:
        """Forecasts [T, B, 3] from features [T, B, 5]."""
        return self.head(self.lstm(x)[0])


def train() -> Forecaster:
    """Fits the network to the training hours of both stations."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    series = [data.training(station) for station in data.STATIONS]
    features = torch.stack([torch.from_numpy(one.features) for one in series])  # [2, T, 5]
    targets = torch.stack([torch.from_numpy(one.targets) for one in series])  # [2, T, 3]
    last = features.shape[1] - max(data.HORIZONS_HOURS) - WINDOW_STEPS
    steps = torch.arange(WINDOW_STEPS)[:, None]

    network = Forecaster()
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=ITERATIONS, pct_start=0.1
    )
    began = time.perf_counter()
    for iteration in range(1, ITERATIONS + 1):
        which = torch.randint(len(series), (BATCH,))
        hours = torch.randint(last, (BATCH,)) + steps  # [T, B]
        x, y = features[which, hours].clone(), targets[which, hours]
        stretch = (1 + STRETCH * (2 * torch.rand(BATCH, 1) - 1)) / SCALE_F
        offset = OFFSET_F * (2 * torch.rand(BATCH, 1) - 1) / SCALE_F
        x[..., :1] = (x[..., :1] - CENTRE_F) * stretch + offset
        y = (y - CENTRE_F) * stretch + offset
        error = (network(x) - y)[WARM_UP_STEPS:]
        loss = nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.02)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), GRADIENT_NORM_MAX)
        optimiser.step()
        schedule.step()
        if iteration % 1_000 == 0:
            mean = error.detach().abs().mean().item() * SCALE_F
            seconds = time.perf_counter() - began
            print(f"iteration {iteration:5d}   MAE {mean:.3f} F   {seconds:.0f} s")
    return network


def export(network: Forecaster, folder: Path) -> Bundle:
    """Folds the normalisation into the weights and writes the bundle."""
    weights = weights_from_torch(network.lstm, head=network.head)
    # W x with x = (t - centre) / scale is (W / scale) t - (W / scale) centre.
    column = weights["layers.0.weight_input"][:, 0] / SCALE_F
    weights["layers.0.weight_input"][:, 0] = column
    weights["layers.0.bias"] -= column * CENTRE_F
    weights["head.weight"] *= SCALE_F
    weights["head.bias"] = weights["head.bias"] * SCALE_F + CENTRE_F
    return save_bundle(folder, SPEC, weights)


def scores(bundle: Bundle, station: str) -> dict[str, np.ndarray]:
    """Mean absolute errors on the held-out hours, degrees Fahrenheit, for each horizon.

    One session reads the six weeks from an empty carry. Scored are the hours after its warm-up for
    which every target exists; the baselines are scored on the same hours.
    """
    features, targets, _ = data.held_out(station)
    rows = slice(WARM_UP_STEPS, len(features) - max(data.HORIZONS_HOURS))
    _, forecast = bundle.network().run(torch.from_numpy(features)[:, None])
    forecasts = {
        "temperature": forecast[:, 0].numpy(),
        "same hour yesterday": data.same_hour_yesterday(features),
        "persistence": data.persistence(features),
    }
    return {name: np.abs(values - targets)[rows].mean(axis=0) for name, values in forecasts.items()}


def report(bundle: Bundle) -> None:
    """Prints the held-out table of the card."""
    print("| station | forecast |" + "".join(f" +{hours} h |" for hours in data.HORIZONS_HOURS))
    print("|---|---|" + "---|" * len(data.HORIZONS_HOURS))
    for station in data.STATIONS:
        for name, errors in scores(bundle, station).items():
            print(f"| {station} | {name} |" + "".join(f" {error:.3f} |" for error in errors))


def main() -> None:
    """Trains, writes the bundle and prints its held-out scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    arguments = parser.parse_args()
    bundle = export(train(), arguments.out)
    report(bundle)
    print(bundle.digest)


if __name__ == "__main__":
    main()

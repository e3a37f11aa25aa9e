"""Trains `sunspots` on the series in `data.py` and writes it as a bundle.

python models/zoo/sunspots/train.py --out DIR
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import data
import numpy as np
import torch
from torch import Tensor, nn

from conveyor_models import Bundle, ModelSpec, Network, save_bundle

SEED = 1843
THREADS = 1
SIZE = 8
LEARNING_RATE = 1e-2
ITERATIONS = 1200
WINDOW_STEPS = 100
WARM_UP_STEPS = 12
"""An empty carry has seen nothing: the first steps of a window are not trained on."""
BATCH = 16
WEIGHT_DECAY = 0.05
NOISE = 0.03
"""Standard deviation of what is added to the features at random, while training."""
GRADIENT_NORM_MAX = 1.0

SPEC = ModelSpec.model_validate(
    {
        "schema": 1,
        "name": "sunspots",
        "description": "The sunspot number of the next year, from those of the years so far."
        " Trained on 1700 to 1899.",
        "input": {"kind": "features", "size": len(data.FEATURES), "labels": data.FEATURES},
        "layers": [{"cell": "rnn", "size": SIZE}],
        "head": {"size": len(data.TARGETS)},
        "output": {"labels": data.TARGETS},
    }
)


def new_weights() -> dict[str, Tensor]:
    """What training begins with: uniform within one over the root of the layer's size."""
    bound = 1 / math.sqrt(SIZE)
    return {
        name: torch.empty(shape).uniform_(-bound, bound).requires_grad_()
        for name, shape in SPEC.weight_shapes.items()
    }


def train() -> dict[str, Tensor]:
    """Fits the weights to the part of the series before the validation part."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    features, targets, years = map(torch.from_numpy, data.series())
    last = int((years < data.VALIDATION_YEAR).sum()) - 1 - WINDOW_STEPS
    steps = torch.arange(WINDOW_STEPS)[:, None]

    weights = new_weights()
    network = Network(SPEC, weights)  # computes with the very tensors that are trained
    optimiser = torch.optim.AdamW(weights.values(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, LEARNING_RATE, total_steps=ITERATIONS, pct_start=0.1
    )
    began = time.perf_counter()
    for iteration in range(1, ITERATIONS + 1):
        rows = torch.randint(last + 1, (BATCH,)) + steps
        read = features[rows] + NOISE * torch.randn(*rows.shape, features.shape[1])
        _, outputs = network.run(read)
        loss = nn.functional.mse_loss(outputs[WARM_UP_STEPS:], targets[rows][WARM_UP_STEPS:])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), GRADIENT_NORM_MAX)
        optimiser.step()
        schedule.step()
        if iteration % 100 == 0:
            said = scores(network, data.VALIDATION_YEAR, data.HELD_OUT_YEAR)["sunspots"]
            seconds = time.perf_counter() - began
            print(f"iteration {iteration:5d}   validation {said}   {seconds:.0f} s", flush=True)
    return {name: each.detach() for name, each in weights.items()}


@torch.no_grad()
def scores(network: Network, first: int, end: int = 10_000) -> dict[str, float]:
    """Root mean square errors, in sunspots, of the forecasts made in some of the years.

    One session reads the series from 1700 on. The autoregression's order is the best of
    `ORDERS` on the validation years; like the network, it is fitted to the years before them.
    """
    features, targets, years = data.series()
    _, outputs = network.run(torch.from_numpy(features)[:, None])
    asked = (years >= first) & (years < end)
    forecasts = {
        "sunspots": outputs[:, 0].numpy(),
        "autoregression": autoregression(features, targets, years),
        "same as this year": features,
    }
    return {
        name: float(data.SCALE * np.sqrt(((rows - targets)[asked] ** 2).mean()))
        for name, rows in forecasts.items()
    }


ORDERS = (1, 2, 3, 6, 9, 12)


def autoregression(features: np.ndarray, targets: np.ndarray, years: np.ndarray) -> np.ndarray:
    """The forecasts [T, 1] of a linear regression on the years so far."""
    validated = (years >= data.VALIDATION_YEAR) & (years < data.HELD_OUT_YEAR)
    found: list[tuple[float, np.ndarray]] = []
    for order in ORDERS:
        lags = [np.roll(features[:, 0], lag) for lag in range(order)]
        table = np.stack([np.ones(len(features)), *lags], axis=1)
        fitted = (years < data.VALIDATION_YEAR) & (np.arange(len(years)) >= order - 1)
        weights = np.linalg.lstsq(table[fitted], targets[fitted], rcond=None)[0]
        forecast = table @ weights
        found.append((((forecast - targets)[validated] ** 2).mean(), forecast))
    return min(found, key=lambda one: one[0])[1]


def main() -> None:
    """Trains, writes the bundle and prints its held-out scores."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    arguments = parser.parse_args()
    bundle: Bundle = save_bundle(arguments.out, SPEC, train())
    for name, score in scores(bundle.network(), data.HELD_OUT_YEAR).items():
        print(f"| {name} | {score} |")
    print(bundle.digest)


if __name__ == "__main__":
    main()
